"""One identity of a run: what its results depend on, behind every store and every worker."""
