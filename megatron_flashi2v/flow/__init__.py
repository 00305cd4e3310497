"""Pure tensor maths of the rectified flow: sigmas, interpolation, Fourier high-pass, loss."""
