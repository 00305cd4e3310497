"""One training step, the loop around it, the optimizer, and metrics."""
