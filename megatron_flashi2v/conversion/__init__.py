"""Weights of other software, read and written: foreign files, formats, conversion."""
