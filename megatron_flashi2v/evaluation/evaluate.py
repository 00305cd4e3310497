"""``evaluate(config)``: sampled videos against real ones, to ``evaluation.json`` and ``report.html``."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.evaluation import flow
from megatron_flashi2v.evaluation.chunks import Chunks, divide
from megatron_flashi2v.evaluation.features.base import VideoFeatures
from megatron_flashi2v.evaluation.features.load import load_features
from megatron_flashi2v.evaluation.fidelity import PSNR_CEILING, WINDOW
from megatron_flashi2v.evaluation.measuring import ImageMeasures, measure_image
from megatron_flashi2v.evaluation.motion import STILL_FLOW
from megatron_flashi2v.evaluation.outputs import (
    EVALUATION_FILE,
    KIND,
    REPORT_FILE,
    read_evaluation,
    require_own,
    require_same_settings,
)
from megatron_flashi2v.evaluation.pairs import Group, Pairing, pair
from megatron_flashi2v.evaluation.report import write_report
from megatron_flashi2v.evaluation.summary import Summary, flow_ratios
from megatron_flashi2v.evaluation.videos import VideoShape, common_shape, find_videos, read_frames
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import atomic_write_json
from megatron_flashi2v.runtime.progress import progress
from megatron_flashi2v.runtime.provenance import source_commit
from megatron_flashi2v.version import __version__

LEAST_PAIRS = 4
"""Pairs under which there is nothing to compare, halved or not."""
FORMAT = 1

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, and write both files into the output folder.

    Everything that can be refused is refused before the first video is measured.

    Returns:
        The contents of ``evaluation.json``.

    Raises:
        UserError: a folder is empty, a file is damaged, videos differ in length or size, there are too few, a feature
            file has another signature, or the output cannot be written.
    """
    require_own(config.output)
    earlier = [read_evaluation(path) for path in config.beside]
    pairing = _paired(config)
    shape = common_shape(_files(pairing), pairing.groups[0].reference)
    chunks = divide(shape.frames, config.chunk_frames, include_first=config.include_first)
    _require_measurable(shape)
    device = resolve_device(config.device)
    features = load_features(*config.feature_source, device)
    try:
        features.check(chunks, shape)
        _require_enough(len(pairing.groups), features.width, config.allow_few)
        settings = _settings(config, features, chunks, shape, len(pairing.groups))
        for path, other in zip(config.beside, earlier, strict=True):
            require_same_settings(settings, other["settings"], path)
        images = _measured(pairing.groups, features, chunks, device.torch_device)
    finally:
        features.close()
    evaluation = {
        "kind": KIND,
        "format": FORMAT,
        "name": config.name or config.videos.resolve().name,
        "measure": features.measure,
        "settings": settings,
        "versions": _versions(),
        "videos": _described(config, pairing, shape),
        **_figures(config, images, chunks),
        "pairs": _rows(pairing, images),
    }
    atomic_write_json(config.output / EVALUATION_FILE, evaluation)
    write_report(config.output / REPORT_FILE, evaluation, earlier, pairing, config.strips)
    logger.info("wrote %s and %s", config.output / EVALUATION_FILE, config.output / REPORT_FILE)
    return evaluation


def _paired(config: EvaluateConfig) -> Pairing:
    """Assign videos to references."""
    pairing = pair(find_videos(config.videos, "videos"), find_videos(config.references, "references"))
    if pairing.unpaired:
        logger.warning(
            "%d files have no counterpart and are left out, such as %s", len(pairing.unpaired), pairing.unpaired[0]
        )
    if len(pairing.groups) < LEAST_PAIRS:
        raise DataError(
            f"{config.videos} and {config.references}: {len(pairing.groups)} references have a video; at least "
            f"{LEAST_PAIRS} are needed. Videos are named as their reference, or ID-SEED.mp4"
        )
    return pairing


def _files(pairing: Pairing) -> list[Path]:
    return [path for group in pairing.groups for path in (group.reference, *group.videos)]


def _require_measurable(shape: VideoShape) -> None:
    if min(shape.height, shape.width) < WINDOW or shape.frames < 2:
        raise DataError(
            f"the videos have {shape}; structural similarity and motion take at least two frames of {WINDOW} x {WINDOW}"
        )


def _require_enough(pairs: int, width: int, allow_few: bool) -> None:
    """Refuse a covariance that cannot be estimated."""
    if pairs >= width:
        return
    if not allow_few:
        raise ConfigError(
            f"{pairs} videos are fewer than the {width} features, so that their covariance is singular and the Frechet "
            "distance far too high; give more videos, features of fewer dimensions, or --allow-few"
        )
    logger.warning("%d videos for %d features: the Frechet distance is far too high; look at the MMD", pairs, width)


def _measured(
    groups: Sequence[Group], features: VideoFeatures, chunks: Chunks, device: torch.device
) -> list[ImageMeasures]:
    images = []
    with progress("evaluating", sum(1 + len(group.videos) for group in groups), unit="videos") as report:
        for group in groups:
            reference, *videos = (read_frames(path).to(device) for path in (group.reference, *group.videos))
            images.append(measure_image(reference, videos, features, chunks))
            report.advance(1 + len(videos))
    return images


def _figures(config: EvaluateConfig, images: Sequence[ImageMeasures], chunks: Chunks) -> dict[str, Any]:
    summary = Summary(images, chunks, config)
    return {
        "chunks": summary.chunks(),
        "fidelity": summary.fidelity(),
        "motion": summary.motion(),
        "diversity": summary.diversity(),
    }


def _settings(
    config: EvaluateConfig, features: VideoFeatures, chunks: Chunks, shape: VideoShape, pairs: int
) -> dict[str, Any]:
    """Return the settings that comparable evaluations share."""
    return {
        "features": features.settings(),
        "pairs": pairs,
        "video": {"frames": shape.frames, "height": shape.height, "width": shape.width},
        "chunks": {"frames": chunks.frames, "first_frame": chunks.first, "count": chunks.count},
        "frechet": {"covariance": "unbiased", "halvings": config.splits},
        "mmd": {"kernel": "(x.y/D + 1)^3", "estimate": "unbiased over pairs", "interval": "studentised bootstrap, 95%",
                "resamples": config.resamples},
        "psnr": {"ceiling_db": PSNR_CEILING},
        "ssim": {"window": WINDOW, "colours": "mean"},
        "flow": {"method": "pyramidal Lucas-Kanade", "longest_side": flow.LONGEST_SIDE, "still_below": STILL_FLOW,
                 "frozen_below": config.frozen_below},
        "seed": config.seed,
    }  # fmt: skip


def _versions() -> dict[str, str | None]:
    return {
        "megatron_flashi2v": __version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "av": av.__version__,
    }


def _described(config: EvaluateConfig, pairing: Pairing, shape: VideoShape) -> dict[str, Any]:
    seeds = [len(group.videos) for group in pairing.groups]
    return {
        "videos": str(config.videos),
        "references": str(config.references),
        "pairing": pairing.rule,
        "references_count": len(pairing.groups),
        "videos_count": pairing.videos,
        "seeds": {"least": min(seeds), "most": max(seeds)},
        "unpaired": [str(path) for path in pairing.unpaired],
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
    }


def _rows(pairing: Pairing, images: Sequence[ImageMeasures]) -> list[dict[str, Any]]:
    """One row a video."""
    return [
        {
            "video": path.name,
            "reference": group.reference.name,
            "flow": float(video.motion.flow.mean()),
            "reference_flow": float(image.reference.motion.flow.mean()),
            "flow_ratio": ratio,
            "psnr_first": float(video.psnr[0]),
            "psnr_last": float(video.psnr[-1]),
            "ssim_first": float(video.ssim[0]),
            "ssim_last": float(video.ssim[-1]),
        }
        for group, image in zip(pairing.groups, images, strict=True)
        for path, video, ratio in zip(group.videos, image.videos, flow_ratios(image), strict=True)
    ]
