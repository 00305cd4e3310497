"""Convert latents [B, C, T, H, W] to rows of patches [S, B, P] and back, tokens in (t, h, w) row-major order."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

Grid = tuple[int, int, int]


def token_grid(latent_shape: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Grid:
    """Tokens along time, height and width.

    Raises:
        ValueError: a side of the latents is no multiple of the patch.
    """
    if any(side % patch for side, patch in zip(latent_shape, patch_size, strict=True)):
        raise ValueError(f"latents of {latent_shape} (frames, rows, columns) do not divide into patches {patch_size}")
    t, h, w = (side // patch for side, patch in zip(latent_shape, patch_size, strict=True))
    return t, h, w


def patchify(latents_BCTHW: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Rows [S, B, P] for the patch embedding; P is laid out (c, pt, ph, pw), as a Conv3d's weight is."""
    pt, ph, pw = patch_size
    return rearrange(
        latents_BCTHW, "b c (t pt) (h ph) (w pw) -> (t h w) b (c pt ph pw)", pt=pt, ph=ph, pw=pw
    )


def output_patches(latents_BCTHW: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Rows [S, B, P] as the head predicts them; P is laid out (pt, ph, pw, c), channel fastest."""
    pt, ph, pw = patch_size
    return rearrange(
        latents_BCTHW, "b c (t pt) (h ph) (w pw) -> (t h w) b (pt ph pw c)", pt=pt, ph=ph, pw=pw
    )


def unpatchify(patches_SBP: Tensor, grid: Grid, patch_size: tuple[int, int, int]) -> Tensor:
    """The reverse of :func:`output_patches`: [B, C, T, H, W]."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    return rearrange(
        patches_SBP, "(t h w) b (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
    )
