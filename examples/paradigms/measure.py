"""Figures of one set of samples against the true clips, each with a 95% bootstrap interval over videos.

Shapes: N videos, K chunks, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flashi2v.evaluation.chunks import divide
from megatron_flashi2v.evaluation.fidelity import PSNR_CEILING
from megatron_flashi2v.evaluation.frechet import frechet_distance
from megatron_flashi2v.evaluation.intervals import bootstrap_mean, wilson
from megatron_flashi2v.evaluation.quality import psnr_per_frame
from megatron_flashi2v.runtime.random import keyed_seed
from paradigms.classifier import Classifier, look, true_steps
from paradigms.world import DIRECTIONS, OBJECTS, Board, Clip, bounce, path_length, track

FROZEN_BELOW = 0.25
"""A video is frozen if its object is there and moves less than this share of its true path."""

Array = NDArray[np.float64]
Figure = dict[str, Any]


def measure_samples(
    clips: Sequence[Clip],
    frames_NTHWC: NDArray[np.uint8],
    network: Classifier,
    *,
    chunk_frames: int,
    resamples: int,
    x0_error_NT: Array | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one set: samples, or other real clips for the floor.

    Args:
        clips: the true continuations, in the order of the samples.
        frames_NTHWC: the samples.
        network: gives the features, and names object and step.
        chunk_frames: of a chunk, from frame 1.
        resamples: of the bootstrap.
        x0_error_NT: of :func:`~paradigms.sampling.sample_set`.
        seed: keys the resampling.

    Returns:
        JSON-ready: each figure has ``value, low, high``, or ``mean, low, high`` lists over chunks or frames.
    """
    true_NTHWC = np.stack([clip.frames_THWC for clip in clips])
    rng = np.random.default_rng(keyed_seed(seed, "bootstrap"))
    chunks = divide(frames_NTHWC.shape[1], chunk_frames, include_first=False)
    tracks = [track(clip, frames) for clip, frames in zip(clips, frames_NTHWC, strict=True)]
    paths, lost_N = [path for path, _ in tracks], np.array([seen_T.mean() < 0.5 for _, seen_T in tracks])
    objects_NK, steps_NK = named(network, frames_NTHWC, range(frames_NTHWC.shape[1] - 1))
    true_NK = np.stack([true_steps(clip) for clip in clips])
    right_N = np.array([OBJECTS.index(clip.object) for clip in clips])
    shares_N = np.array([
        path_length(path) / path_length(clip.path_T2) for clip, path in zip(clips, paths, strict=True)
    ])
    psnr_NT = np.stack([
        np.minimum(psnr_per_frame(true, frames), PSNR_CEILING)
        for true, frames in zip(true_NTHWC, frames_NTHWC, strict=True)
    ])
    figures: dict[str, Any] = {
        "videos": len(clips),
        "chunks": [[frames.start, frames.stop - 1] for frames in chunks.ranges],
        "frechet": frechet_chunks(network, frames_NTHWC, true_NTHWC, chunk_frames, resamples, rng),
        "frozen": share((shares_N < FROZEN_BELOW) & ~lost_N),
        "lost": share(lost_N),
        "failed": share((shares_N < FROZEN_BELOW) | lost_N),
        "path_share": means(shares_N[:, None], resamples, rng),
        "law": means((steps_NK == true_NK).mean(1, keepdims=True), resamples, rng),
        "cells": means(_cells_right(clips, paths)[:, None], resamples, rng),
        "object": means((objects_NK == right_N[:, None]).mean(1, keepdims=True), resamples, rng),
        "psnr": means(psnr_NT, resamples, rng),
        "still": means((steps_NK == 0).astype(np.float64), resamples, rng),
    }
    if x0_error_NT is not None:
        figures["x0_error"] = means(x0_error_NT[:, 1:].mean(1, keepdims=True), resamples, rng)
        by_chunk = np.stack([x0_error_NT[:, frames].mean(1) for frames in chunks.ranges], axis=1)
        figures["x0_error_chunks"] = means(by_chunk, resamples, rng)
    return figures


def frechet_chunks(
    network: Classifier, frames_NTHWC: NDArray[np.uint8], true_NTHWC: NDArray[np.uint8], chunk_frames: int,
    resamples: int, rng: np.random.Generator,
) -> Figure:  # fmt: skip
    """Frechet distance of each chunk in the network's features; the mean of its pairs of frames.

    The interval is the bootstrap's over videos with their true clips, moved so that its centre is the value: resampled
    sets have doubles, which makes their distances too high.
    """
    values, lows, highs = [], [], []
    for frames in divide(frames_NTHWC.shape[1], chunk_frames, include_first=False).ranges:
        pairs = [(look(network, frames_NTHWC, first)[0], look(network, true_NTHWC, first)[0]) for first in frames[:-1]]
        value = _mean_distance(pairs, np.arange(len(frames_NTHWC)))
        drawn = np.array([
            _mean_distance(pairs, rng.integers(len(frames_NTHWC), size=len(frames_NTHWC))) for _ in range(resamples)
        ])
        low, high = np.quantile(drawn, (0.025, 0.975)) - np.median(drawn) + value
        values.append(value)
        lows.append(max(0.0, float(low)))
        highs.append(float(high))
    return {"mean": values, "low": lows, "high": highs}


def named(
    network: Classifier, frames_NTHWC: NDArray[np.uint8], firsts: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Objects and steps that the network names in each pair of frames, ``[N, pairs]`` each."""
    seen = [look(network, frames_NTHWC, first)[1:] for first in firsts]
    objects, steps = (np.stack(column, axis=1) for column in zip(*seen, strict=True))
    return objects, steps


def means(values_NT: Array, resamples: int, rng: np.random.Generator) -> Figure:
    """Mean over videos with its interval; one number where there is one column."""
    found = [bound.tolist() for bound in bootstrap_mean(values_NT.astype(np.float64), resamples, rng)]
    mean, low, high = (bound[0] if values_NT.shape[1] == 1 else bound for bound in found)
    return {"mean": mean, "low": low, "high": high}


def chance(clips: Sequence[Clip], board: Board) -> float:
    """Share of right steps of an object that starts in the picture and moves by any law but the caption's, or by it.

    All laws count alike whose first step hits no wall, as in the world.
    """
    found = []
    for clip in clips:
        start_2, true_T2 = clip.path_T2[0], np.diff(clip.path_T2, axis=0)
        for law, step_2 in DIRECTIONS.items():
            if all(0 <= place + step < board.cells for place, step in zip(start_2, step_2, strict=True)):
                steps_T2 = np.diff(bounce(start_2.tolist(), law, board), axis=0)
                found.append((steps_T2 == true_T2).all(1).mean())
    return float(np.mean(found))


def share(hits_N: NDArray[np.bool_]) -> Figure:
    """A share with Wilson's interval, which is sound at 0 and 1 where the bootstrap's is empty."""
    low, high = wilson(int(hits_N.sum()), len(hits_N))
    return {"mean": float(hits_N.mean()), "low": low, "high": high}


def _cells_right(clips: Sequence[Clip], paths: Sequence[NDArray[np.int64]]) -> Array:
    """Share of the frames after the first whose object is where the law puts it."""
    return np.array([
        (path[1:] == clip.path_T2[1:]).all(1).mean() for clip, path in zip(clips, paths, strict=True)
    ])


_Pairs = list[tuple[Array, Array]]


def _mean_distance(pairs: _Pairs, rows: NDArray[np.int64]) -> float:
    return float(np.mean([frechet_distance(one[rows], other[rows]) for one, other in pairs]))
