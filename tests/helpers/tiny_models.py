"""Small encoders with random weights, and small videos, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch

WORDS = ("a", "person", "dog", "car", "walks", "drives", "runs", "red", "blue", "through", "the", "street", "in")


def make_tiny_vae(
    folder: Path | str,
    *,
    z_dim: int = 4,
    base_dim: int = 8,
    dim_mult: Sequence[int] = (1, 1, 2),
    temporal: Sequence[bool] = (False, True),
    seed: int = 0,
) -> Path:
    """A diffusers folder with an AutoencoderKLWan; by default temporal stride 2 and spatial stride 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    model = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=list(dim_mult),
        num_res_blocks=1,
        temperal_downsample=list(temporal),
        latents_mean=[0.1 * channel for channel in range(z_dim)],
        latents_std=[0.5 + 0.25 * channel for channel in range(z_dim)],
        scale_factor_temporal=2 ** sum(temporal),
        scale_factor_spatial=2 ** (len(dim_mult) - 1),
    )
    model.save_pretrained(str(folder))
    return Path(folder)


def make_tiny_text_encoder(folder: Path | str, *, text_dim: int = 16, vocab_size: int = 64, seed: int = 0) -> Path:
    """A transformers folder with a UMT5EncoderModel of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=text_dim,
        d_kv=text_dim // 2,
        d_ff=2 * text_dim,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    UMT5EncoderModel(config).save_pretrained(str(folder))
    return Path(folder)


def make_tiny_image_encoder(folder: Path | str, *, width: int = 12, image_size: int = 8, seed: int = 0) -> Path:
    """A transformers folder with a CLIPVisionModel of three layers and patches of 2, and its processor."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        image_size=image_size, patch_size=2, hidden_act="gelu",
    )
    model = CLIPVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    settings = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size}, "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "do_normalize": True, "resample": 3,
    }
    Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
    return Path(folder)


def make_tiny_tokenizer(folder: Path | str) -> Path:
    """A tokenizer of a few words that appends the end token, as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return Path(folder)


def frame_pattern(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: frame ``number`` shows it as a grey level, which survives lossy coding; corners differ."""
    frame = np.full((height, width, 3), 16 + 4 * (number % 56), dtype=np.uint8)
    frame[: height // 2, : width // 2, 0] = 240  # the top left quarter is reddish, so that rotation shows
    return frame


def frame_number(frame_HWC: np.ndarray) -> int:
    """The reverse of :func:`frame_pattern`, modulo 56."""
    height, width = frame_HWC.shape[:2]
    grey = frame_HWC[3 * height // 4 :, 3 * width // 4 :].astype(float).mean()
    return round((grey - 16) / 4)


def make_video(
    path: Path | str,
    frames: int,
    height: int,
    width: int,
    fps: int = 16,
    *,
    codec: str = "mpeg4",
    gop: int = 12,
    rotation: int = 0,
    gaps: Sequence[int] = (),
) -> Path:
    """A video file whose frame ``i`` is :func:`frame_pattern` of ``i``.

    Args:
        path: the ending picks the container.
        frames: how many.
        height: pixels as coded.
        width: pixels as coded.
        fps: frames per second.
        codec: an encoder's name in FFmpeg.
        gop: distance of key frames.
        rotation: degrees by which players turn the picture counter-clockwise.
        gaps: numbers of frames before which the time stamps skip one frame (a variable rate).
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.options = {"b": "4M"} if codec == "mpeg4" else {}
        if rotation:
            stream.set_display_rotation(rotation)
        late = 0
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(frame_pattern(number, height, width), format="rgb24")
            late += number in gaps
            frame.pts = number + late
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)
