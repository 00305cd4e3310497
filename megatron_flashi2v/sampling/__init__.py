"""Solvers, guidance, the image-to-video pipeline, and video writing."""
