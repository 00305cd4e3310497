"""One short file per format: how to read weights from it and how to write them to it."""
