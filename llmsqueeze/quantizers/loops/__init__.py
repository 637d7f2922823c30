"""Loops over the columns of a weight, compiled for the CPU: a tile of rows at a time, which stays in cache."""
