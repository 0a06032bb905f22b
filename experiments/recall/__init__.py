"""A small recall task, models trained on it in minutes, and where they keep what they recall."""
