"""The last module that the server of `forkserver()` imports.

It takes all that was imported out of the reach of the garbage collector. Otherwise each of its children would search
these objects, more than a million, again and again, and would copy the memory that it shares with the server.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
