"""Attention, and its cached keys and values."""
