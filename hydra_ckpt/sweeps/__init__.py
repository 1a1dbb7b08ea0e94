"""Jobs of a sweep: what is recorded of each, how an interrupted sweep goes on, and the summary. Imports no torch."""
