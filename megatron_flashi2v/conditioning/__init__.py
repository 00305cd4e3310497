"""Image-to-video paradigms, one file each."""
