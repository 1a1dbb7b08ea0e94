"""What makes a save due: schedules and signals. They decide; they know nothing about how to save."""
