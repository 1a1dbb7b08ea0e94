"""One load, from a selector to installed state: `restoring` (which one), `load` (ours), `foreign` (other tools'), `translation` (names)."""
