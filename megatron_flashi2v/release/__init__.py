"""Models in the Hugging Face world: a diffusers pipeline, and the folder that it loads."""
