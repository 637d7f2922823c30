"""Quality: perplexity, divergence, tasks; models beside each other."""
