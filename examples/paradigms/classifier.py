"""A fixed network, trained on real clips of both domains, that names object and step in two frames.

Its last hidden layer gives the features of the chunk-wise Frechet distance: they see what this world consists of, where
features of pixels or of networks trained on other footage hardly notice a frozen object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from megatron_flashi2v.data.transforms import to_model_range
from megatron_flashi2v.runtime.files import atomic_write_bytes
from megatron_flashi2v.runtime.progress import progress
from megatron_flashi2v.runtime.random import keyed_seed
from paradigms.world import CELL, DIRECTIONS, DOMAINS, OBJECTS, Board, Clip, make_clip

FEATURES = 32
STEPS = ((0, 0), *DIRECTIONS.values())
"""Steps that the network tells apart; the first is none, which real clips never show and frozen ones do."""
BATCH = 64
STILL_SHARE = 0.15
EVALUATION_BATCH = 512


class Classifier(nn.Module):
    """Two frames to 32 features, and from them the object's and the step's logits.

    Cells become tokens, a 3 x 3 convolution over both frames' sees any step from its cell, and the strongest response
    over the board counts: where on the board it happens does not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Sequential(
            nn.Conv2d(6, 96, CELL, stride=CELL), nn.GELU(), nn.Conv2d(96, 64, 1), nn.GELU(),
            nn.Conv2d(64, 128, 3, padding=1), nn.GELU(), nn.Conv2d(128, 128, 1), nn.GELU(),
        )  # fmt: skip
        self.features = nn.Linear(128, FEATURES)
        self.object = nn.Linear(FEATURES, len(OBJECTS))
        self.step = nn.Linear(FEATURES, len(STEPS))

    def forward(self, pairs_N6HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features ``[N, 32]`` of unit length, logits of the object and of the step.

        With their length bounded, a few broken samples do not decide a distance, which is at most 4.
        """
        features_ND = F.layer_norm(self.features(self.cells(pairs_N6HW).amax((2, 3))), (FEATURES,))
        return features_ND / FEATURES**0.5, self.object(features_ND), self.step(features_ND)


def frame_pairs(frames_NTHWC: NDArray[np.uint8], first: int) -> torch.Tensor:
    """Frames ``first`` and ``first + 1`` of each clip, fp32 ``[N, 6, H, W]`` in [-1, 1]."""
    pair = torch.from_numpy(frames_NTHWC[:, first : first + 2]).flatten(0, 1).permute(0, 3, 1, 2)
    pixels_CMHW = to_model_range(pair)
    height, width = pixels_CMHW.shape[2:]
    return pixels_CMHW.transpose(0, 1).reshape(len(frames_NTHWC), 6, height, width)


def true_steps(clip: Clip) -> NDArray[np.int64]:
    """Index in :data:`STEPS` of each of the clip's steps, ``[T - 1]``."""
    return np.array([STEPS.index(tuple(step)) for step in np.diff(clip.path_T2, axis=0).tolist()])


def train_classifier(board: Board, clips: int, steps: int, seed: int) -> tuple[Classifier, dict[str, float]]:
    """Train on real clips; returns the network and its accuracies on other real clips, by domain.

    It learns from so many clips of each domain, none of those that the paradigms see or are tested on. A share of the
    pairs shows one frame twice, for the step none; noise on the pixels makes the network robust to what samples look
    like.
    """
    generator = torch.Generator().manual_seed(keyed_seed(seed, "classifier"))
    with torch.random.fork_rng():
        torch.manual_seed(keyed_seed(seed, "classifier-weights"))
        network = Classifier()
    pairs_N6HW, objects_N, steps_N = _real_pairs([
        make_clip(board, domain, seed, f"classifier-{number}") for domain in DOMAINS for number in range(clips)
    ])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with progress("classifier", steps) as report:
        for _ in range(steps):
            rows = torch.randint(len(pairs_N6HW), (BATCH,), generator=generator)
            batch_N6HW, batch_steps = pairs_N6HW[rows].clone(), steps_N[rows].clone()
            still = torch.rand(BATCH, generator=generator) < STILL_SHARE
            batch_N6HW[still, 3:] = batch_N6HW[still, :3]
            batch_steps[still] = 0
            batch_N6HW += 0.1 * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(
                batch_N6HW.shape, generator=generator
            )
            _, objects, moves = network(batch_N6HW)
            loss = F.cross_entropy(objects, objects_N[rows]) + F.cross_entropy(moves, batch_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report.advance(note=f"loss {loss.item():.3f}")
    network.eval()
    return network, {
        f"{what}_{domain}": value for domain in DOMAINS for what, value in _accuracies(network, board, domain, seed)
    }


@torch.no_grad()
def look(network: Classifier, frames_NTHWC: NDArray[np.uint8], first: int) -> tuple[NDArray, NDArray, NDArray]:
    """Features fp64 ``[N, 32]`` of two frames from ``first``, and the indices of the object and the step named."""
    parts = [network(part) for part in frame_pairs(frames_NTHWC, first).split(EVALUATION_BATCH)]
    features, objects, steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return features.double().numpy(), objects.argmax(1).numpy(), steps.argmax(1).numpy()


def save_classifier(network: Classifier, path: Path) -> None:
    """Write the weights as safetensors."""
    atomic_write_bytes(path, safetensors.torch.save(network.state_dict()))


def load_classifier(path: Path) -> Classifier:
    """The reverse of :func:`save_classifier`."""
    network = Classifier()
    network.load_state_dict(safetensors.torch.load_file(path))
    return network.eval()


def _real_pairs(clips: Sequence[Clip]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pair of frames of each clip, at a place that runs through the clips, with its labels."""
    pairs, objects, steps = [], [], []
    for number, clip in enumerate(clips):
        first = number % (len(clip.path_T2) - 1)
        frames_2HWC = np.stack([clip.draw(cell) for cell in clip.path_T2[first : first + 2]])
        pairs.append(frame_pairs(frames_2HWC[None], 0))
        objects.append(OBJECTS.index(clip.object))
        steps.append(int(true_steps(clip)[first]))
    return torch.cat(pairs), torch.tensor(objects), torch.tensor(steps)


def _accuracies(network: Classifier, board: Board, domain: str, seed: int) -> list[tuple[str, float]]:
    clips = [make_clip(board, domain, seed, f"classifier-check-{number}") for number in range(256)]
    frames = np.stack([clip.frames_THWC for clip in clips])
    _, objects, steps = look(network, frames, 0)
    _, _, still = look(network, frames[:, [0, 0]], 0)
    return [
        ("object", float(np.mean(objects == [OBJECTS.index(clip.object) for clip in clips]))),
        ("step", float(np.mean(steps == [true_steps(clip)[0] for clip in clips]))),
        ("still", float(np.mean(still == 0))),
    ]
