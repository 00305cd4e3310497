"""Large-scale training of FlashI2V image-to-video diffusion transformers on megatron-core."""

__version__ = "0.1.0"
