"""The flow-matching loss, split so that data and context shards weigh right."""

from __future__ import annotations

from torch import Tensor


def squared_error_sum(prediction: Tensor, target: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Sum of squared errors over the local elements, in fp32.

    Divide by the element count of the *global* batch: dividing by the local count would weigh uneven shards
    wrong.

    Args:
        prediction: the model's velocity, any float dtype.
        target: same shape.
        dim: axes to sum over; all by default.

    Returns:
        fp32, a scalar where all axes are summed; gradients flow to both arguments in their own dtypes.

    Raises:
        ValueError: the shapes differ (broadcasting would hide an error).
    """
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target differ in shape: {shapes}")
    return (prediction.float() - target.float()).square().sum(dim)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all local elements, fp32 scalar."""
    return squared_error_sum(prediction, target) / prediction.numel()
