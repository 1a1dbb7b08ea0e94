"""Preparations in the process that launches a sweep's jobs, before the first job. Imports no torch."""
