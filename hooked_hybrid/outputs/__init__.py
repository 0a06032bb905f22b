"""Folders and files of results: claimed, written whole, and read as data."""
