"""Folders and files of results: locking folders, writing files atomically, reading safely."""
