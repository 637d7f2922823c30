"""The parts of a check: the one reading of a folder, the numbers in it, and the programs that open it."""
