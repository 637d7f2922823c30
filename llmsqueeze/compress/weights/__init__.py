"""From a decision to parts: weights, fusion groups, blocks, embeddings and head."""
