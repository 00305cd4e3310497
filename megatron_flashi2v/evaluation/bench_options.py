"""What the benches can be told, apart from them, so that their ``--help`` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_flashi2v.config.train import ParallelArguments, RecomputeArguments

MODELS = Path("examples/quickstart/models")


@dataclass(frozen=True, kw_only=True)
class BlockBenchmark:
    """Settings of a measurement.

    Attributes:
        model: preset whose widths are taken.
        latent_shape: latent frames, rows and columns; 1 60 104 is 1,560 tokens.
        dtypes: of weights and activations.
        attention_backend: implementation, or auto.
        device: auto, cuda, npu or cpu.
        rounds: measurements of each block, in turn.
        clock: wall, or cpu for this process's own time: with OMP_NUM_THREADS=1, on a CPU that others use as well.
        json: file for the report.
    """

    model: str = "1.3b"
    latent_shape: tuple[int, int, int] = (1, 60, 104)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    attention_backend: str = "auto"
    device: str = "auto"
    rounds: int = 5
    clock: Literal["wall", "cpu"] = "wall"
    json: Path | None = None


@dataclass(frozen=True, kw_only=True)
class KernelBenchmark:
    """Settings of a measurement.

    Attributes:
        models: presets whose widths are taken.
        latent_shape: latent frames, rows and columns; 13 60 104 is 49 frames of 480x832 pixels.
        operators: names; all without.
        skip: implementations to leave out; inductor compiles for minutes on CPUs.
        dtypes: dtypes of the activations.
        device: auto, cuda, npu or cpu.
        rounds: measurements of each, interleaved; the table has medians.
        bucket_shapes: other latent shapes, whose first calls are timed after that of latent_shape.
        json: file for the report.
    """

    models: tuple[str, ...] = ("1.3b", "14b")
    latent_shape: tuple[int, int, int] = (13, 60, 104)
    operators: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16",)
    device: str = "auto"
    rounds: int = 5
    bucket_shapes: tuple[tuple[int, int, int], ...] = ((13, 104, 60), (13, 80, 80), (9, 60, 104), (21, 40, 64))
    json: Path | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark:
    """What to measure.

    Attributes:
        model: preset; it is text to video, which diffusers' pipeline samples too.
        num_layers: blocks, where the preset's take too long.
        vae: folder of the VAE.
        text_encoder: folder of the text encoder.
        tokenizer: folder of its tokenizer.
        num_frames: video frames.
        height: pixels.
        width: pixels.
        num_steps: Euler steps.
        guidance_scale: classifier-free guidance.
        bf16: the transformer and the text encoder in bf16, in both pipelines.
        attention_backend: implementation of ours, or auto.
        batched_guidance: ours computes both guidance passes in one call, which diffusers' pipeline cannot.
        device: auto, cuda, npu or cpu.
        rounds: videos of each pipeline, in turn.
        json: file for the report.
    """

    model: str = "tiny"
    num_layers: int | None = None
    vae: Path = MODELS / "vae"
    text_encoder: Path = MODELS / "text_encoder"
    tokenizer: Path = MODELS / "tokenizer"
    num_frames: int = 9
    height: int = 48
    width: int = 80
    num_steps: int = 20
    guidance_scale: float = 5.0
    bf16: bool = False
    attention_backend: str = "auto"
    batched_guidance: bool = False
    device: str = "auto"
    rounds: int = 5
    json: Path | None = None


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Settings of a measurement.

    Attributes:
        model: preset.
        num_layers: blocks, where the preset's do not fit.
        conditioning: image-to-video paradigm; the peer has text_to_video.
        latent_shape: latent frames, rows and columns; 13 60 104 is 49 frames of 480x832 pixels.
        micro_batch_size: samples in the step.
        bf16: matrix products in bf16 with fp32 master weights; the peer holds its weights in bf16 alone.
        recompute: what is computed again in backward, as in training; the peer can do all blocks or none.
        parallel: the layout, where a launcher such as torchrun starts several ranks; without a pipeline.
        attention_backend: implementation, or auto.
        device: auto, cuda, npu or cpu.
        rounds: measured steps.
        elementwise_backend: implementation of norms, modulation and activation, or auto.
        peer: diffusers' model with torch's AdamW, in the same run, step by step in turn; compiled block by block if
            asked for, as its users do to make it faster.
        profile: also break one step down by kinds of work: launches, time and its distance from the least that copies
            and products of this run's speed would take; and count how often the host reads the device.
        json: file for the report.
    """

    model: str = "1.3b"
    num_layers: int | None = None
    conditioning: str = "flashi2v"
    latent_shape: tuple[int, int, int] = (13, 60, 104)
    micro_batch_size: int = 1
    bf16: bool = True
    recompute: RecomputeArguments = RecomputeArguments()
    parallel: ParallelArguments = ParallelArguments()
    attention_backend: str = "auto"
    elementwise_backend: str = "auto"
    device: str = "auto"
    rounds: int = 5
    peer: Literal["none", "diffusers", "diffusers-compiled"] = "none"
    profile: bool = True
    json: Path | None = None
