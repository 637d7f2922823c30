"""lm-eval tasks: how they are asked, what they are called, what two models made of the same questions."""
