"""Everything that is measured on one image: its reference and the videos sampled from its first frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_flashi2v.evaluation.chunks import Chunks
from megatron_flashi2v.evaluation.diversity import mean_distance, pixel_diversity
from megatron_flashi2v.evaluation.features.base import VideoFeatures
from megatron_flashi2v.evaluation.fidelity import psnr_to_image, ssim_to_image
from megatron_flashi2v.evaluation.motion import Motion, motion_of

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class VideoMeasures:
    """Of one video; T frames, K chunks, D features.

    Attributes:
        features_KD: of each chunk.
        psnr: of each frame to the condition, dB, ``[T]``.
        ssim: likewise, ``[T]``.
        similarity: cosine of features of :func:`compared_frames` to the condition's.
        motion: from each frame to the next.
    """

    features_KD: Array
    psnr: Array
    ssim: Array
    similarity: Array
    motion: Motion


@dataclass(frozen=True, kw_only=True)
class ImageMeasures:
    """Of one condition image.

    Attributes:
        reference: the real video's.
        videos: one for each seed.
        pixel_diversity: between seeds, by frame, ``[T]``; None with one seed.
        feature_diversity: between seeds, by chunk, ``[K]``; None with one seed.
    """

    reference: VideoMeasures
    videos: tuple[VideoMeasures, ...]
    pixel_diversity: Array | None
    feature_diversity: Array | None


def measure_image(
    reference_THWC: torch.Tensor, videos_THWC: Sequence[torch.Tensor], features: VideoFeatures, chunks: Chunks
) -> ImageMeasures:
    """Measure a reference and its videos.

    Args:
        reference_THWC: uint8 RGB; its frame 0 is the condition image.
        videos_THWC: of the same shape, one for each seed.
        features: the network.
        chunks: how the frames are divided.
    """
    condition = reference_THWC[0]
    condition_D = features.of_frames(condition[None])[0]
    videos = tuple(_measure(frames, condition, condition_D, features, chunks) for frames in videos_THWC)
    several = len(videos) > 1
    return ImageMeasures(
        reference=_measure(reference_THWC, condition, condition_D, features, chunks),
        videos=videos,
        pixel_diversity=pixel_diversity(videos_THWC) if several else None,
        feature_diversity=_feature_diversity(videos) if several else None,
    )


def compared_frames(num_frames: int, chunks: Chunks) -> list[int]:
    """Frames whose features are compared with the condition's: the first, each chunk's first, and the last."""
    return sorted({0, *(part.start for part in chunks.ranges), num_frames - 1})


def _measure(
    frames_THWC: torch.Tensor,
    condition_HWC: torch.Tensor,
    condition_D: torch.Tensor,
    features: VideoFeatures,
    chunks: Chunks,
) -> VideoMeasures:
    shown = frames_THWC[compared_frames(len(frames_THWC), chunks)]
    similarity = F.cosine_similarity(features.of_frames(shown).double(), condition_D.double()[None], dim=1)
    return VideoMeasures(
        features_KD=features.of_chunks(frames_THWC, chunks).double().numpy(),
        psnr=psnr_to_image(frames_THWC, condition_HWC),
        ssim=ssim_to_image(frames_THWC, condition_HWC),
        similarity=similarity.numpy(),
        motion=motion_of(frames_THWC),
    )


def _feature_diversity(videos: Sequence[VideoMeasures]) -> Array:
    features_SKD = np.stack([video.features_KD for video in videos])
    return np.array([mean_distance(features_SKD[:, chunk]) for chunk in range(features_SKD.shape[1])])
