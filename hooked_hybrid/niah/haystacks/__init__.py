"""Texts in which needles are placed."""
