"""What is told of a folder: contents, plots, pages, the card, the Hub."""
