"""One short file per format: reads its weights and writes them."""
