"""Distillation: a compressed model learns from its original. distilling.py is the verb, compensate/ has the tensors."""
