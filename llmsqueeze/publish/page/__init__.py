"""HTML pages about compressed models. Each is one file that loads nothing."""
