"""The losses of a model on a text: its windows, its logits, perplexity, divergence from another model."""
