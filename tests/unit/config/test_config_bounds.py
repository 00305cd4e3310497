"""One walker checks the bounds that stand at fields, wherever these are nested."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from megatron_flashi2v.config.bounds import (
    Above,
    AtLeast,
    Below,
    EndsWith,
    Matches,
    OneOf,
    Within,
    check_bounds,
    nearest,
)
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.fields import HoldsPath
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.sample import ImageSettings, check_sampling_settings
from megatron_flashi2v.config.train import OptimizerArguments, TrainConfig
from megatron_flashi2v.models.presets import PRESETS

PATH_RULE = "a path of at most 3800 bytes, each name in it of at most 255"


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, AtLeast(0), Below(1)] = 0.5
    ranks: tuple[Annotated[int, AtLeast(0)], ...] = (0,)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    count: Annotated[int | None, AtLeast(1)] = None
    share: Annotated[float, Within(0, 1)] = 0.0
    scale: Annotated[float, Above(0)] = 1.0
    kind: Literal["a", "b"] = "a"
    place: tuple[Annotated[str, OneOf("wan", "diffusers")], Path] = ("wan", Path("x"))
    video: Annotated[Path | None, EndsWith(".mp4")] = None
    files: tuple[Annotated[str, HoldsPath()], ...] = ()
    word: Annotated[str | None, Matches("[a-z]+", "small letters")] = None
    free: float = 0.0


@pytest.mark.parametrize("config", [
    Outer(),
    Outer(inner=Inner(rate=0.0), count=1, share=1, scale=1e-9, video=Path("A.MP4")),
    Outer(inner=Inner(ranks=())),
    Outer(video=Path(f"{'n' * 251}.mp4"), files=("f/" * 300, f"wan:{'n' * 255}"), word="abc"),
])  # fmt: skip
def test_kept(config: Outer) -> None:
    check_bounds(config)


@pytest.mark.parametrize("config, message", [
    (Outer(inner=Inner(rate=1.0)), "--rate is 1.0; it must be at least 0 and below 1"),
    (Outer(inner=Inner(rate=-1)), "--rate is -1; it must be at least 0 and below 1"),
    (Outer(inner=Inner(ranks=(0, -2))), "--ranks is -2; it must be at least 0"),
    (Outer(count=0), "--count is 0; it must be at least 1"),
    (Outer(count=True), "--count is True; it must be a whole number"),
    (Outer(count="2"), "--count is '2'; it must be a whole number"),  # type: ignore[arg-type]
    (Outer(share=1.5), "--share is 1.5; it must be between 0 and 1"),
    (Outer(scale=0.0), "--scale is 0.0; it must be above 0"),
    (Outer(scale="x"), "--scale is 'x'; it must be a number"),  # type: ignore[arg-type]
    (Outer(free=float("nan")), "--free is nan; it must be a finite number"),
    (Outer(free=float("inf")), "--free is inf; it must be a finite number"),
    (Outer(place=("difusers", Path("x"))),
     "--place is 'difusers'; it must be one of wan, diffusers; did you mean diffusers?"),
    (Outer(video=Path(f"{'視' * 84}.mp4")), f"--video is {'視' * 84}.mp4; it must be {PATH_RULE}"),
    (Outer(place=("wan", Path("a") / ("n" * 256))), f"--place is a/{'n' * 256}; it must be {PATH_RULE}"),
    (Outer(files=("a", "0/" * 2000)), f"--files is '{'0/' * 2000}'; it must be {PATH_RULE}"),
    (Outer(files=("a\0b",)), "--files is 'a\\x00b'; it must be a path without the character of code 0"),
    (Outer(word="aB"), "--word is 'aB'; it must be small letters"),
    (Outer(video=Path("a.gif")), "--video is a.gif; it must be a file that ends in .mp4"),
])  # fmt: skip
def test_broken(config: Outer, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_bounds(config)
    assert str(error.value) == message


def test_a_configuration_out_of_bounds_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="^--lr is -1; it must be at least 0$"):
        TrainConfig(optimizer=OptimizerArguments(lr=-1))
    with pytest.raises(ConfigError, match="^--lr is -1.0; it must be at least 0$"):
        TrainConfig.from_flags(lr=-1)


@pytest.mark.parametrize("make, message", [
    (lambda: ImageSettings(cutoff_ratio=2.0), "^cutoff_ratio is 2.0; it must be between 0 and 1$"),
    (lambda: check_sampling_settings(num_steps=0, guidance_scale=1.0, shift=1.0), "^num_steps is 0; .* at least 1$"),
    (lambda: check_sampling_settings(num_steps=1, guidance_scale=1.0, shift=0.0), "^shift is 0.0; it must be above 0$"),
    (lambda: ModelConfig.from_json({**PRESETS["tiny"].to_json(), "num_layers": 0}, source="a.json"),
     "^a.json: num_layers is 0; it must be at least 1$"),
    (lambda: ModelConfig.from_json({**PRESETS["tiny"].to_json(), "num_layers": 1.5}, source="a.json"),
     "^a.json: num_layers is 1.5; it must be a whole number$"),
])  # fmt: skip
def test_what_is_no_flag_is_called_by_its_field(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_only_near_names_are_suggested() -> None:
    known = ["num_layers", "fp8_format", "train_iters", "micro_batch_size"]
    assert nearest("num_workers", known) is nearest("ckpt_format", known) is nearest("iters", known) is None
    assert nearest("form", ["to", "from"]) == "from"
    assert nearest("train_iter", known) == "train_iters" and nearest("num_layer", known) == "num_layers"
