"""From the flag ``--features`` to a network."""

from __future__ import annotations

from pathlib import Path

from megatron_flashi2v.evaluation.features.base import VideoFeatures
from megatron_flashi2v.runtime.device import Device


def load_features(kind: str, path: Path | None, device: Device) -> VideoFeatures:
    """Load a network of features.

    Args:
        kind: one of ``config.evaluate.FEATURE_PATHS``.
        path: its file or folder; None only for ``transnetv2``.
        device: where it runs.

    Raises:
        ConfigError: a file is missing, damaged, or of another signature.
    """
    if kind == "transnetv2":
        from megatron_flashi2v.evaluation.features.transnetv2 import TransNetV2Features

        return TransNetV2Features(path, device.torch_device)
    assert path is not None, "the configuration demands a path"
    if kind == "i3d":
        from megatron_flashi2v.evaluation.features.i3d import I3DFeatures

        return I3DFeatures(path, str(device.torch_device) if device.runs_torchscript else "cpu")
    if kind == "videomae":
        from megatron_flashi2v.evaluation.features.videomae import VideoMAEFeatures

        return VideoMAEFeatures(path, device.torch_device)
    from megatron_flashi2v.evaluation.features.latents import LatentFeatures

    return LatentFeatures(path, device.torch_device)
