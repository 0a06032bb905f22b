"""Random calls at the seams of the library, each compared with its definition."""
