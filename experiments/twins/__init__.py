"""A hybrid and its twins without attention and without recurrence, trained alike and compared."""
