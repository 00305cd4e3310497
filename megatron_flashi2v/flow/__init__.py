"""The mathematics of flow matching: noise levels, interpolation, target, loss and Fourier features.

Pure functions of tensors in fp32; random draws are passed in. Nothing here knows of models, ranks or files.
"""
