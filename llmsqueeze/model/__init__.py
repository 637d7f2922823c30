"""The original model: found, read lazily, laid out without weights, walked block by block; and the text it reads."""
