"""The frozen video VAE and text encoder."""
