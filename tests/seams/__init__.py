"""Random calls at the seams of the library, each beside its definition."""
