"""HTML pages about compressed models: one file each, which loads nothing and needs no server."""
