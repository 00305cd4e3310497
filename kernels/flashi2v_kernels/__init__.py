"""Operators of video diffusion transformers, each with a plain reference and implementations per device."""
