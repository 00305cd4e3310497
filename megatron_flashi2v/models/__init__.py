"""The diffusion transformer on megatron-core."""
