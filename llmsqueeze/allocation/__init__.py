"""Allocation: which weights get more bits, or stay as they are."""
