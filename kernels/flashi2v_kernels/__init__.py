"""Operators of video diffusion transformers, each with a plain reference and implementations per device.

``registry.resolve`` chooses an implementation; the operators are the sub-packages. Importing this package
imports nothing, importing the registry only torch.
"""
