"""What is measured of the original: second moments, gradients, costs, rankings."""
