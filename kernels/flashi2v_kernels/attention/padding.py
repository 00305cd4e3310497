"""What implementations without padded keys say to them."""

from __future__ import annotations

from torch import Tensor


def refuse_padded_keys(implementation: str, key_padding_mask_BK: Tensor | None) -> None:
    """Raise where keys are masked.

    Raises:
        NotImplementedError: there is a mask.
    """
    if key_padding_mask_BK is not None:
        raise NotImplementedError(
            f"{implementation} takes no padded keys; resolve attention with the feature key_padding"
        )
