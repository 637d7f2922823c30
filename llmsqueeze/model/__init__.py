"""The original model: find it, read it lazily, lay it out without weights, walk it block by block; and its text."""
