"""Texts that needles are placed in."""
