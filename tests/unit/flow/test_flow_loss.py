from __future__ import annotations

import pytest
import torch

from megatron_flashi2v.flow.loss import mean_squared_error, squared_error_sum


def test_uneven_shards_add_up_to_the_mean():
    prediction, target = torch.randn(4, 7), torch.randn(4, 7)
    parts = [squared_error_sum(prediction[:, cut], target[:, cut]) for cut in (slice(0, 2), slice(2, 7))]
    torch.testing.assert_close(sum(parts) / prediction.numel(), mean_squared_error(prediction, target))
    torch.testing.assert_close(mean_squared_error(prediction, target), (prediction - target).square().mean())


def test_axes_that_are_not_summed_are_kept():
    prediction, target = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    expected = torch.stack([squared_error_sum(prediction[:, index], target[:, index]) for index in range(3)])
    torch.testing.assert_close(squared_error_sum(prediction, target, (0, 2)), expected)


def test_bf16_predictions_are_summed_in_fp32():
    prediction = torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    total = squared_error_sum(prediction, torch.zeros(4096))
    assert total.dtype == torch.float32 and total.item() == 4096.0
    total.backward()
    assert prediction.grad.dtype == torch.bfloat16 and set(prediction.grad.tolist()) == {2.0}


def test_broadcasting_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        squared_error_sum(torch.rand(2, 3), torch.rand(1, 3))
