"""Peak compute of devices, for the denominator of MFU."""

from __future__ import annotations

import torch

from megatron_flashi2v.runtime.device import Device

PEAK_BF16_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense peaks in NVIDIA's data sheets, by part of the card's name; longer parts first."""


def peak_tflops(device: Device, dtype: torch.dtype) -> float | None:
    """The data sheet's dense peak in TFLOP/s; None if unknown."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if name in device.model_name()), None)
