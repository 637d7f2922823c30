"""GGUF files, which llama.cpp and what is built on it open: types, a base that the converter makes, and the file."""
