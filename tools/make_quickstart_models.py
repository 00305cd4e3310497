"""Make the small models that the quickstart ships.

WORK IN PROGRESS: the docstring is completed below once figures are known.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

HEIGHT, WIDTH, FRAMES = 48, 80, 9
SPATIAL_STRIDE, TEMPORAL_STRIDE, LATENT_CHANNELS = 4, 2, 16
VAE_CONFIG = {
    "base_dim": 40,
    "decoder_base_dim": 40,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": SPATIAL_STRIDE,
    "scale_factor_temporal": TEMPORAL_STRIDE,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}

console = Console(width=110)


# --------------------------------------------------------------------------------------------------------------
# Footage
# --------------------------------------------------------------------------------------------------------------
def read_video(path: Path) -> torch.Tensor:
    """Decode a file, resized to cover ``HEIGHT x WIDTH``: uint8 ``[T, 3, h >= HEIGHT, w >= WIDTH]``."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
            scale = max(HEIGHT / image.shape[-2], WIDTH / image.shape[-1])
            size = (max(HEIGHT, round(image.shape[-2] * scale)), max(WIDTH, round(image.shape[-1] * scale)))
            image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
            frames.append(image.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(frames)


def read_videos(folder: Path) -> dict[str, torch.Tensor]:
    """Decode every ``.mp4`` of a folder; see :func:`read_video`."""
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise SystemExit(f"no .mp4 file in {folder}")
    return {path.stem: read_video(path) for path in paths}


def centre_crop(frames: torch.Tensor) -> torch.Tensor:
    """``[T, 3, h, w]`` -> ``[T, 3, HEIGHT, WIDTH]``."""
    top, left = (frames.shape[-2] - HEIGHT) // 2, (frames.shape[-1] - WIDTH) // 2
    return frames[..., top : top + HEIGHT, left : left + WIDTH]


def to_model(frames: torch.Tensor) -> torch.Tensor:
    """uint8 ``[T, 3, H, W]`` -> float ``[1, 3, T, H, W]`` in [-1, 1]."""
    return (frames.float() / 127.5 - 1.0).transpose(0, 1)[None]


def windows(frames: torch.Tensor, limit: int | None = None) -> list[torch.Tensor]:
    """Evenly spaced, non-overlapping windows ``[FRAMES, 3, HEIGHT, WIDTH]`` of a decoded file, at most ``limit``."""
    frames = centre_crop(frames)
    starts = list(range(0, len(frames) - FRAMES + 1, FRAMES))
    if limit is not None and len(starts) > limit:
        starts = [starts[round(i * (len(starts) - 1) / (limit - 1))] for i in range(limit)]
    return [frames[start : start + FRAMES] for start in starts]


def random_crops(
    videos: dict[str, torch.Tensor], rng: random.Random, batch: int, frames: int, height: int, width: int
) -> torch.Tensor:
    """Random windows in time and space, at temporal stride 1 or 2, half of them mirrored: ``[B, 3, T, h, w]``."""
    crops = []
    for _ in range(batch):
        video = videos[rng.choice(sorted(videos))]
        step = rng.choice((1, 1, 2))
        first = rng.randrange(len(video) - (frames - 1) * step)
        top = rng.randrange(video.shape[-2] - height + 1)
        left = rng.randrange(video.shape[-1] - width + 1)
        crop = video[first : first + (frames - 1) * step + 1 : step, :, top : top + height, left : left + width]
        crops.append(to_model(crop.flip(-1) if rng.random() < 0.5 else crop))
    return torch.cat(crops)


# --------------------------------------------------------------------------------------------------------------
# Video autoencoder
# --------------------------------------------------------------------------------------------------------------
def psnr(video: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """PSNR in dB over the 8-bit pixels of two videos ``[1, 3, T, H, W]`` in [-1, 1]."""
    a, b = (((v.clamp(-1, 1) + 1) * 127.5).round() for v in (video, reconstruction))
    return 10 * math.log10(255.0**2 / max(float((a - b).square().mean()), 1e-10))


@torch.no_grad()
def evaluate(
    vae: AutoencoderKLWan, videos: dict[str, torch.Tensor], limit: int | None = None
) -> tuple[dict[str, float], list[float], list[float]]:
    """Mean PSNR of each file's windows, and the latents' mean and std per channel (posterior mean)."""
    scores, latents = {}, []
    for name, frames in videos.items():
        values = []
        for window in windows(frames, limit):
            video = to_model(window)
            latent = vae.encode(video).latent_dist.mode()
            latents.append(latent.transpose(0, 1).flatten(1))
            values.append(psnr(video, vae.decode(latent).sample))
        scores[name] = sum(values) / len(values)
    flat = torch.cat(latents, dim=1).double()
    return scores, flat.mean(1).tolist(), flat.std(1).tolist()


def mean_score(scores: dict[str, float]) -> float:
    """Mean over the files."""
    return sum(scores.values()) / len(scores)


def save_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder, then put it in the place of ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    write(fresh)
    if target.exists():
        os.rename(target, old)
    os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def train_vae(
    videos: dict[str, torch.Tensor], output: Path, minutes: float, seed: int, save_minutes: float = 5.0
) -> None:
    """Train the autoencoder for a span of wall-clock time; the best weights so far are always in ``output``."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    with torch.no_grad():  # start with little posterior noise
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    average = AutoencoderKLWan(**VAE_CONFIG).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    console.print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.3f} M parameters, {minutes} minutes")

    best, step, begin, saved, shown = -1.0, 0, time.monotonic(), 0.0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("vae", total=1.0)
        done = 0.0
        while done < 1.0:
            minute = (time.monotonic() - begin) / 60
            done = min(1.0, minute / minutes)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1.0, (step + 1) / 100, 0.02 + 0.98 * (1 - done) / 0.75)
            if done < SMALL_SHARE:
                video = random_crops(videos, rng, *SMALL)
            else:
                video = random_crops(videos, rng, *FULL)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(video).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            error = decoded.float() - video
            loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                decay = min(0.999, 1 - 10 / (step + 10))
                for mean, value in zip(average.parameters(), vae.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
            progress.update(task, completed=done, description=f"vae step {step} loss {float(loss):.4f}")
            if minute - shown >= 0.5:
                shown = minute
                console.print(f"{minute:.1f} min, step {step}, loss {float(loss):.4f}")
            if minute - saved >= save_minutes or done >= 1.0:
                saved = minute
                scores, mean_, std_ = evaluate(average, videos, None if done >= 1.0 else 4)
                score = mean_score(scores)
                console.print(
                    f"{minute:.1f} min, step {step}: PSNR {score:.2f} dB  "
                    + "  ".join(f"{n} {s:.2f}" for n, s in scores.items())
                )
                console.print("   std " + " ".join(f"{s:.2f}" for s in std_))
                if score > best:
                    best = score
                    average.register_to_config(latents_mean=mean_, latents_std=std_)
                    save_folder(output / "vae", average.save_pretrained)


def decode_unclamped(vae: AutoencoderKLWan, latent: torch.Tensor) -> torch.Tensor:
    """``vae.decode`` (whose clamp would stop gradients of saturated pixels is harmless here)."""
    return vae.decode(latent).sample


PEAK_LR = 2e-3
KL_WEIGHT = 1e-5
SMALL = (4, 5, 32, 48)
FULL = (2, 9, HEIGHT, WIDTH)
SMALL_SHARE = 0.7


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--output", type=Path, default=Path("examples/quickstart/models"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    t = time.monotonic()
    videos = read_videos(args.videos)
    console.print({k: tuple(v.shape) for k, v in videos.items()}, f"{time.monotonic() - t:.1f}s")
    train_vae(videos, args.output, args.minutes, args.seed)


if __name__ == "__main__":
    main()
