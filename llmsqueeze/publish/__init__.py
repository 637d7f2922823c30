"""Facts of a compressed folder for people: contents, plots, pages, the model card, the Hub."""
