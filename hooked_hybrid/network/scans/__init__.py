"""Linear recurrences over positions."""
