"""Stress tests: damaged checkpoints, kills and long runs, at counts that the tests do not run."""
