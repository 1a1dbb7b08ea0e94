"""What makes a save due: schedules and signals. They decide; they know nothing of how a save is done."""
