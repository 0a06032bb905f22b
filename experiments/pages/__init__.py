"""Measured figures of the pages, written into them from results kept in the tree."""
