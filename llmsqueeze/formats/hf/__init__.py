"""The format for transformers: the layer of a compressed linear, and the quantizer that places it."""
