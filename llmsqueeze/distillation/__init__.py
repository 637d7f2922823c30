"""Distillation: a compressed model learns from its original."""
