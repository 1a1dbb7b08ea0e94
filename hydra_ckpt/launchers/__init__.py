"""What happens in the process that launches a sweep's jobs, before the first of them. Imports no torch."""
