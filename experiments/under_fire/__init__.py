"""The library under fire: damaged checkpoints, long soaks, at counts that tests do not run."""
