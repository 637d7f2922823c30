"""Mixtures of experts: the matrices of experts as ordinary linears, and where the model routes tokens."""
