"""Formats: how compressed weights lie in files."""
