"""Observers of a run: figures, validation, previews, traces. Training computes the same without them."""
