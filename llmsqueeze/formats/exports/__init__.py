"""The other formats that a compressed folder can be exported to, and the conversion of its tensors."""
