"""Attention, and the keys and values it remembers."""
