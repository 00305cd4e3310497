"""Image-to-video paradigms side by side in a generated world with laws of motion: ``bash examples/paradigms.sh``."""
