"""From the measures of all images to the figures of ``evaluation.json``.

Shapes: N images, K chunks, D features, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.config.evaluate import EvaluateConfig
from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.diversity import mean_distance
from megatron_flashi2v.evaluation.frechet import frechet_distance, halves_distance
from megatron_flashi2v.evaluation.intervals import bootstrap_mean, wilson
from megatron_flashi2v.evaluation.measuring import ImageMeasures, VideoMeasures, compared_frames
from megatron_flashi2v.evaluation.mmd import discrepancy
from megatron_flashi2v.evaluation.motion import flow_ratio
from megatron_flashi2v.runtime.random import keyed_seed

Array = NDArray[np.float64]


class Summary:
    """Figures over all images, each with its own draws.

    Args:
        images: at least four.
        chunks: how the frames were divided.
        config: resampling and thresholds.
    """

    def __init__(self, images: Sequence[ImageMeasures], chunks: Chunks, config: EvaluateConfig) -> None:
        self._images, self._chunks, self._config = images, chunks, config

    def chunks(self) -> list[dict[str, Any]]:
        """The distances of each chunk, one video an image."""
        return [self._chunk(place, part) for place, part in enumerate(self._chunks.ranges)]

    def fidelity(self) -> dict[str, Any]:
        """How frames resemble the condition, over time; the references' own frames beside the videos'."""
        frames = len(self._images[0].reference.psnr)
        compared = compared_frames(frames, self._chunks)
        return {
            "frames": list(range(frames)),
            "psnr": self._both("psnr", lambda video: video.psnr),
            "ssim": self._both("ssim", lambda video: video.ssim),
            "similarity_frames": compared,
            "similarity": self._both("similarity", lambda video: video.similarity),
        }

    def motion(self) -> dict[str, Any]:
        """Motion from each frame to the next, and the share of frozen videos."""
        frames = len(self._images[0].reference.psnr)
        ratios = [ratio for image in self._images for ratio in flow_ratios(image) if ratio is not None]
        frozen = sum(ratio < self._config.frozen_below for ratio in ratios)
        low, high = wilson(frozen, len(ratios)) if ratios else (None, None)
        return {
            "frames": list(range(1, frames)),
            "differences": self._both("differences", lambda video: video.motion.differences),
            "flow": self._both("flow", lambda video: video.motion.flow),
            "flow_ratio": self._flow_ratio(),
            "frozen": {"share": frozen / len(ratios) if ratios else None, "low": low, "high": high, "count": frozen,
                       "of": len(ratios)},
            "still_references": sum(flow_ratios(image)[0] is None for image in self._images),
        }  # fmt: skip

    def diversity(self) -> dict[str, Any] | None:
        """How seeds of one image differ; None where no image has several."""
        several = [image for image in self._images if image.pixel_diversity is not None]
        if not several:
            return None
        between_images = [mean_distance(self._features("videos", place)) for place in range(self._chunks.count)]
        pixels = np.stack([image.pixel_diversity for image in several if image.pixel_diversity is not None])
        features = np.stack([image.feature_diversity for image in several if image.feature_diversity is not None])
        return {
            "images": len(several),
            "frames": list(range(pixels.shape[1])),
            "pixels": self._mean("diversity pixels", pixels),
            "first_frames": [part.start for part in self._chunks.ranges],
            "features": self._mean("diversity features", features),
            "features_between_images": between_images,
        }

    def _chunk(self, place: int, part: range) -> dict[str, Any]:
        videos_ND, references_ND = self._features("videos", place), self._features("references", place)
        found = discrepancy(videos_ND, references_ND, self._config.resamples, self._generator("mmd", place))
        halves = halves_distance(videos_ND, references_ND, self._config.splits, self._generator("halves", place))
        return {
            "first_frame": part.start,
            "last_frame": part.stop - 1,
            "frechet": frechet_distance(videos_ND, references_ND),
            "mmd": found.value,
            "mmd_low": found.low,
            "mmd_high": found.high,
            "halves": asdict(halves),
        }

    def _features(self, side: str, place: int) -> Array:
        """[N, D] of one chunk; of several seeds, the first."""
        chosen = [image.videos[0] if side == "videos" else image.reference for image in self._images]
        return np.stack([video.features_KD[place] for video in chosen])

    def _both(self, name: str, values: Callable[[VideoMeasures], Array]) -> dict[str, Any]:
        sides = {
            "videos": [np.mean([values(video) for video in image.videos], axis=0) for image in self._images],
            "references": [values(image.reference) for image in self._images],
        }
        return {side: self._mean(f"{name} {side}", np.stack(rows)) for side, rows in sides.items()}

    def _mean(self, name: str, values_NT: Array) -> dict[str, list[float]]:
        found = bootstrap_mean(values_NT, self._config.resamples, self._generator(name))
        return dict(zip(("mean", "low", "high"), (bound.tolist() for bound in found), strict=True))

    def _flow_ratio(self) -> dict[str, float] | None:
        """Of each image, the mean over its seeds; None where no reference moves."""
        rows = [[ratio for ratio in flow_ratios(image) if ratio is not None] for image in self._images]
        means = np.array([[np.mean(row)] for row in rows if row])
        if not len(means):
            return None
        found = bootstrap_mean(means, self._config.resamples, self._generator("flow ratio"))
        return dict(zip(("mean", "low", "high"), (float(bound[0]) for bound in found), strict=True))

    def _generator(self, *purpose: int | str) -> np.random.Generator:
        return np.random.default_rng(keyed_seed(self._config.seed, "evaluation", *purpose))


def flow_ratios(image: ImageMeasures) -> list[float | None]:
    """Of each video of an image; None beside a reference that does not move."""
    return [flow_ratio(video.motion, image.reference.motion) for video in image.videos]
