"""Jobs of a sweep: their records, how an interrupted sweep continues, and the summary. Imports no torch."""
