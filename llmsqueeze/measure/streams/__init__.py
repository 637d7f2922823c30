"""The residual streams of the original and of the compressed model, and their passage through a block."""
