"""Weights that others wrote, and weights for others: readers of foreign files, formats, conversion."""
