"""Resumable work, its workers, and the identity of a run."""
