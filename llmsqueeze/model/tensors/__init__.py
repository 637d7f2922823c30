"""Where the tensors of a model come from: names, conversions and ties in the file."""
