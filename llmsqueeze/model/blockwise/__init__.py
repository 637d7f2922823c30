"""A model run block by block, with the weights of one decoder block in memory at a time."""
