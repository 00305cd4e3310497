"""Patches: token order, value order, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_flashi2v.models.patches import output_patches, patchify, token_grid, unpatchify

PATCH_SIZES = [(1, 2, 2), (2, 1, 3), (1, 1, 1)]


def latents_for(patch_size: tuple[int, int, int]) -> torch.Tensor:
    """[2, 3, T, H, W] with a grid of (2, 3, 4) tokens; every value is different."""
    sides = [tokens * side for tokens, side in zip((2, 3, 4), patch_size, strict=True)]
    count = 6 * sides[0] * sides[1] * sides[2]
    return torch.arange(count, dtype=torch.float32).view(2, 3, *sides)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_round_trip(patch_size: tuple[int, int, int]) -> None:
    latents = latents_for(patch_size)
    grid = token_grid(tuple(latents.shape[2:]), patch_size)
    assert grid == (2, 3, 4)
    assert torch.equal(unpatchify(output_patches(latents, patch_size), grid, patch_size), latents)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_linear_on_patches_is_a_convolution_whose_stride_is_its_kernel(patch_size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(latents_for(patch_size).shape, generator=generator)
    weight = torch.randn(5, 3, *patch_size, generator=generator)
    convolved_BDTHW = F.conv3d(latents, weight, stride=patch_size)
    tokens_SBD = patchify(latents, patch_size) @ weight.flatten(1).T
    torch.testing.assert_close(tokens_SBD.permute(1, 2, 0), convolved_BDTHW.flatten(2))


def test_output_patches_have_the_channel_fastest() -> None:
    latents, patch_size = latents_for((2, 1, 3)), (2, 1, 3)
    rows_SBP = output_patches(latents, patch_size)
    for t, h, w in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        row_P = rows_SBP[(t * 3 + h) * 4 + w, 1]
        for dt, dw, channel in ((0, 0, 2), (1, 2, 0), (1, 1, 1)):
            assert row_P[(dt * 3 + dw) * 3 + channel] == latents[1, channel, 2 * t + dt, h, 3 * w + dw]


def test_latents_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 7, 12\).*\(1, 2, 2\)"):
        token_grid((3, 7, 12), (1, 2, 2))
