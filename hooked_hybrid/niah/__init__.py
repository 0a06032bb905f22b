"""Needle in a haystack: prompts, scores, sweeps."""
