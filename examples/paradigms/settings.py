"""Every number of an experiment, by scale."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

PARADIGMS = ("flashi2v", "repeat_concat", "zero_pad_concat", "inpainting")
SETS = ("trained", "held", "out")
"""Pictures that are sampled from: of training clips, of others of the same domain, and of the other domain."""
SET_NAMES = {"trained": "trained on", "held": "held, in domain", "out": "out of domain"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One experiment in pixels.

    Attributes:
        cells: of the board along each side.
        frames: of a clip.
        chunk_frames: of a chunk of the Frechet distance, counted from frame 1.
        train_clips: clips of the in-domain training set.
        test_clips: pictures to sample from, by set.
        layers: of the transformer; the three after it are its widths and its heads.
        iterations: at which each run is measured; the last ends it.
        start_iterations: of the text-to-video run that all paradigms start from; 0: they start from scratch.
        train_flags: more flags of ``flashi2v train``, the same for every paradigm.
        paradigm_flags: and those of one paradigm.
        seeds: of training; each is a run of every paradigm.
        solver_steps: of sampling.
        train_shift: of the noise levels in training; see the record in README.md.
        shift: of those in sampling.
        classifier_clips: real clips of each domain that the classifier learns from.
        classifier_steps: optimizer steps of the classifier.
        resamples: of the bootstrap.
    """

    cells: int
    frames: int
    chunk_frames: int
    train_clips: int
    test_clips: dict[str, int]
    layers: int
    hidden: int
    ffn: int
    heads: int
    batch: int
    iterations: tuple[int, ...]
    start_iterations: int = 0
    train_flags: tuple[str, ...] = ()
    paradigm_flags: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    paradigms: tuple[str, ...] = PARADIGMS
    seeds: tuple[int, ...] = (1,)
    solver_steps: int = 25
    train_shift: float = 15.0
    shift: float = 7.0
    classifier_clips: int = 4096
    classifier_steps: int = 1500
    resamples: int = 200
    world_seed: int = 1

    def to_json(self, *names: str) -> dict[str, Any]:
        """These fields, JSON-ready; all without names."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: values[name] for name in names or values}


OPTIMIZER = (
    "--lr", "2e-3", "--lr-decay-style", "cosine", "--min-lr", "1e-4", "--lr-warmup-iters", "50", "--adam-beta2", "0.99",
)  # fmt: skip

SMOKE = Settings(
    cells=4, frames=5, chunk_frames=2, train_clips=64, test_clips={"trained": 48, "held": 48, "out": 48},
    layers=2, hidden=64, ffn=128, heads=2, batch=16, iterations=(100, 200), train_flags=OPTIMIZER,
    solver_steps=8, classifier_clips=1024, classifier_steps=400, resamples=100,
)  # fmt: skip
TINY = Settings(
    cells=4, frames=5, chunk_frames=2, train_clips=512, test_clips={"trained": 96, "held": 96, "out": 96},
    layers=3, hidden=128, ffn=384, heads=4, batch=16, iterations=(1500, 2250, 2625, 3000),
    train_flags=OPTIMIZER, seeds=(3, 4), solver_steps=12,
)  # fmt: skip
SCALES = {"smoke": SMOKE, "tiny": TINY}
