"""Experiments and measurements on hooked hybrids."""
