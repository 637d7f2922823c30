"""The entropy coder: rANS streams, frequency tables, steps on a logarithmic grid."""
