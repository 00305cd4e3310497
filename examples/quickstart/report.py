"""Measures what the quickstart trained: summary.json, loss.png, and samples beside their sources.

    python report.py --run runs/quickstart --videos FOLDER --models FOLDER

For one clip of each scene the trained model, the untrained one, and the trained one given another scene's image sample
from the same prompt and noise. If the image conditions the video, the trained model's first frame is the image.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_flashi2v.checkpoint.folders import load_model_config
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.data.transforms import resize_and_crop
from megatron_flashi2v.data.video import Video
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.evaluation.curves import read_metrics, write_training_curves
from megatron_flashi2v.evaluation.quality import mean_psnr
from megatron_flashi2v.runtime.device import Device, resolve_device
from megatron_flashi2v.runtime.files import atomic_write_json
from megatron_flashi2v.runtime.logging import setup_logging
from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline, to_frames
from megatron_flashi2v.sampling.video import StripRow, write_comparison, write_mp4

SCENES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
ENLARGE = 4
"""As in quickstart.sh: a video of 80 x 48 pixels is too small to watch."""
VAE_EVERY = 6
"""The VAE is measured on every sixth clip."""


@dataclass(frozen=True)
class Clip:
    """A prepared sample with its source pixels, uint8 [T, H, W, C]."""

    caption: str
    frames_THWC: NDArray[np.uint8]
    latents_CTHW: torch.Tensor

    @property
    def image_CHW(self) -> torch.Tensor:
        """The condition image, uint8."""
        return torch.from_numpy(self.frames_THWC[0]).permute(2, 0, 1)


def read_clip(dataset: PreparedDataset, index: int, videos: Path) -> Clip:
    """The sample and the frames that it was made from."""
    record, info = dataset.record(index), dataset.info
    with Video(videos / record["source"], picture=dataset.settings.get("picture", "stored")) as video:
        frames_TCHW = resize_and_crop(video.read(record["frames"]), info.height, info.width)
    return Clip(record["caption_raw"], frames_TCHW.permute(0, 2, 3, 1).numpy(), dataset[index].latents_CTHW)


def scene_clips(dataset: PreparedDataset, videos: Path) -> list[Clip]:
    """The clip in the middle of each scene."""
    sources = [dataset.record(index)["source"] for index in range(len(dataset))]
    places = [[index for index, source in enumerate(sources) if source == scene] for scene in SCENES]
    return [read_clip(dataset, found[len(found) // 2], videos) for found in places]


def vae_psnr(dataset: PreparedDataset, vae: VideoVAE, videos: Path) -> float:
    """Mean PSNR in dB of the decoded latents of clips against their pixels."""
    values = []
    for index in range(0, len(dataset), VAE_EVERY):
        clip = read_clip(dataset, index, videos)
        values.append(mean_psnr(clip.frames_THWC, to_frames(vae.decode(clip.latents_CTHW[None]))[0]))
    return fmean(values)


def sample_all(
    folder: Path, models: Path, dataset: PreparedDataset, clips: list[Clip], vae: VideoVAE, device: Device
) -> dict[str, NDArray[np.uint8]]:
    """Frames [scene, T, H, W, C] of the trained model, the untrained one, and the trained with swapped images."""
    # These import megatron-core, which the log must be ready for.
    from megatron_flashi2v.models.build import build_model
    from megatron_flashi2v.models.initialization import initialize_weights
    from megatron_flashi2v.parallel.world import single_process
    from megatron_flashi2v.sampling.load import load_model, velocity_of

    config, info = load_model_config(folder), dataset.info
    text = TextEncoder.load(models / "text_encoder", models / "tokenizer", config.text_length, device.torch_device)
    images = [clip.image_CHW for clip in clips]
    prompts = [clip.caption for clip in clips]
    seed = json.loads((folder / "state.json").read_text())["seed"]
    with single_process(device) as groups:
        trained, untrained = load_model(folder, groups, device), build_model(config, groups, device)
        initialize_weights(untrained, seed)
        frames = {}
        for name, model, pictures in (
            ("trained", trained, images),
            ("swapped", trained, images[1:] + images[:1]),
            ("untrained", untrained, images),
        ):
            pipeline = ImageToVideoPipeline(
                velocity=velocity_of(model), vae=vae, text_encoder=text, model_config=config,
                device=device.torch_device,
            )
            frames[name] = pipeline(
                pictures, prompts, num_frames=info.frames, height=info.height, width=info.width,
                num_steps=20, guidance_scale=1.0, seed=0,
            ).frames_BTHWC
    return frames


def first_frame_psnr(frames_STHWC: NDArray[np.uint8], clips: list[Clip]) -> float:
    """Mean over scenes of the first frame's PSNR in dB against the scene's own image."""
    return fmean(mean_psnr(clip.frames_THWC[:1], frames[:1]) for clip, frames in zip(clips, frames_STHWC, strict=True))


def main() -> None:
    """Write everything into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--run", "--videos", "--models"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    setup_logging()
    from megatron_flashi2v.sampling.load import resolve_checkpoint

    run = arguments.run
    folder = resolve_checkpoint(run / "checkpoints")
    device = resolve_device("cpu")
    dataset = PreparedDataset(run / "data")
    vae = VideoVAE.load(arguments.models / "vae", device.torch_device)
    clips = scene_clips(dataset, arguments.videos)
    frames = sample_all(folder, arguments.models, dataset, clips, vae, device)
    rows = read_metrics(run / "checkpoints" / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    tenth = max(len(losses) // 10, 1)
    shapes = parameter_shapes(load_model_config(folder))
    summary = {
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "samples": len(dataset),
        "steps": len(rows),
        "loss_first_tenth": fmean(losses[:tenth]),
        "loss_last_tenth": fmean(losses[-tenth:]),
        "step_time_s": float(np.median([row["step_time_s"] for row in rows])),
        "vae_psnr_db": vae_psnr(dataset, vae, arguments.videos),
        "first_frame_psnr_trained_db": first_frame_psnr(frames["trained"], clips),
        "first_frame_psnr_untrained_db": first_frame_psnr(frames["untrained"], clips),
        "first_frame_psnr_swapped_image_db": first_frame_psnr(frames["swapped"], clips),
    }
    write_training_curves(
        {"quickstart": run / "checkpoints" / "metrics.jsonl"}, run / "loss.png",
        title=f"{summary['parameters'] / 1e6:.1f} M parameters, {len(dataset)} clips, {len(rows)} iterations",
    )
    write_mp4(run / "source.mp4", clips[0].frames_THWC, dataset.info.fps, enlarge=ENLARGE)
    write_comparison(run / "sample.png", [
        row
        for scene, clip in enumerate(clips)
        for row in (
            StripRow(frames_THWC=clip.frames_THWC, label=f"source: {clip.caption}"),
            StripRow(frames_THWC=frames["trained"][scene], label="trained, this image"),
            StripRow(frames_THWC=frames["swapped"][scene], label="trained, another scene's image"),
            StripRow(frames_THWC=frames["untrained"][scene], label="untrained"),
        )
    ])
    atomic_write_json(run / "summary.json", summary)


if __name__ == "__main__":
    main()
