"""Plots: bits and errors by decoder block, predicted cost against size, quality against size.

matplotlib draws them. It is optional and slow to import, so only the functions import it; `figure.available` tells
whether it is installed.
"""
