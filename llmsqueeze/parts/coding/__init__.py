"""The entropy coder: rANS streams, frequency tables, logarithmic steps."""
