"""Samples of one checkpoint from the pictures of one set, and its prediction from pure noise.

Noise is keyed by the clip's name, so that every paradigm starts from the same. Where frames come from a real VAE,
``flashi2v sample --requests`` does this work (``files.py``); it takes a VAE's folder, which pixels have not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from megatron_flashi2v.config.sample import ImageSettings
from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.flow.sigmas import NUM_TRAIN_TIMESTEPS
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.files import atomic_write_bytes
from megatron_flashi2v.sampling.load import describe, load_stages, resolve_checkpoint, velocity_of
from megatron_flashi2v.sampling.noise import sample_noise
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline
from paradigms.pixels import LawRows, PixelVAE, clip_latents
from paradigms.world import Board, Clip

BATCH = 32
SEED = 0


def sample_set(
    checkpoint: Path, clips: Sequence[Clip], board: Board, output: Path, *, solver_steps: int, shift: float
) -> None:
    """Write ``frames`` (uint8 ``[N, T, H, W, 3]``) and ``x0_error`` (fp32 ``[N, T]``) as one safetensors file.

    The error is that of the latents that one step from pure noise predicts, as a mean square over each frame; the
    latents of the world have a variance near 1.

    Args:
        checkpoint: an ``iter_*`` of any paradigm.
        clips: whose pictures and captions are given.
        board: of the clips.
        output: the file.
        solver_steps: Euler steps, without guidance.
        shift: of the noise levels.
    """
    folder = resolve_checkpoint(checkpoint)
    config, _ = describe(folder)
    device = resolve_device("cpu")
    with single_process(device) as groups:
        pipeline = ImageToVideoPipeline(
            velocity=velocity_of(load_stages(folder, groups, device, ParallelArguments())),
            vae=PixelVAE(),  # type: ignore[arg-type]
            text_encoder=LawRows(),
            model_config=config,
            device=device.torch_device,
        )
        frames, errors = [], []
        for first in range(0, len(clips), BATCH):
            part = clips[first : first + BATCH]
            sampled = pipeline(
                _pictures(part), [clip.caption for clip in part], num_frames=board.frames, height=board.pixels,
                width=board.pixels, num_steps=solver_steps, guidance_scale=1.0, shift=shift, seed=SEED,
                keys=[clip.key for clip in part],
            )
            frames.append(torch.from_numpy(sampled.frames_BTHWC))
            errors.append(first_step_error(pipeline, part, board))
    tensors = {"frames": torch.cat(frames), "x0_error": torch.cat(errors)}
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(output, safetensors.torch.save(tensors))


def first_step_error(pipeline: ImageToVideoPipeline, clips: Sequence[Clip], board: Board) -> torch.Tensor:
    """Mean squared error of ``noise - velocity(noise)`` against the true latents, fp32 ``[B, T]``."""
    captions, fitted_BCHW = pipeline.prepare(
        _pictures(clips), [clip.caption for clip in clips], board.pixels, board.pixels
    )
    shape = pipeline.vae.latent_shape(board.frames, board.pixels, board.pixels)
    keys = [clip.key for clip in clips]
    noise_BCTHW = sample_noise(SEED, keys, shape)
    velocity_BCTHW = pipeline.velocity(
        noise_BCTHW,
        torch.full((len(clips),), float(NUM_TRAIN_TIMESTEPS)),
        pipeline.encode_text(captions),
        pipeline.encode_images(fitted_BCHW, len(clips), shape),
        pipeline.extras(ImageSettings(), SEED, keys, shape),
    )
    true_BCTHW = torch.stack([clip_latents(clip) for clip in clips])
    return (noise_BCTHW - velocity_BCTHW - true_BCTHW).square().mean((1, 3, 4))


def read_samples(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Frames and errors of :func:`sample_set`."""
    tensors = safetensors.torch.load_file(path)
    return tensors["frames"].numpy(), tensors["x0_error"].double().numpy()


def _pictures(clips: Sequence[Clip]) -> list[torch.Tensor]:
    """The conditions: true first frames, uint8 ``[3, H, W]``."""
    return [torch.from_numpy(clip.draw(clip.path_T2[0])).permute(2, 0, 1) for clip in clips]
