"""The Python API's names: imported when they are asked for; configurations by the flags' names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_flashi2v
from megatron_flashi2v import ConvertConfig, PrepareConfig, TrainConfig, UserError
from megatron_flashi2v.config.recipe import parse

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def test_every_name_is_there() -> None:
    promised = {"TrainConfig", "train", "prepare", "convert", "ImageToVideoPipeline", "FlashI2VPipeline"}
    assert promised <= set(megatron_flashi2v.__all__)
    for name in megatron_flashi2v.__all__:
        assert name in dir(megatron_flashi2v) and getattr(megatron_flashi2v, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Trian'"):
        _ = megatron_flashi2v.Trian


def test_configurations_and_commands_need_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_flashi2v import ConvertConfig, PrepareConfig, TrainConfig, convert, prepare, train\n"
        f"TrainConfig.from_recipe({str(RECIPES / 'tiny.yaml')!r}, train_iters=3)\n"
        "assert not {'torch', 'megatron', 'diffusers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_recipe_and_values_are_the_command_lines(tmp_path: Path) -> None:
    recipe = RECIPES / "tiny.yaml"
    found = TrainConfig.from_recipe(
        str(recipe), data_path=[0.7, tmp_path / "a", 0.3, "b"], save=tmp_path, load=None, train_iters=12, bf16=True,
        profile_ranks=(0, 1), lr=1e-3, exit_interval=None,
    )
    flags = ["--config", str(recipe), "--data-path", "0.7", f"{tmp_path}/a", "0.3", "b", "--save", str(tmp_path),
             "--load", "None", "--train-iters", "12", "--bf16", "--profile-ranks", "0", "1", "--lr", "0.001"]
    assert found == parse(TrainConfig, flags, prog="", description="")
    assert found.batch.global_batch_size == 8 and found.checkpoint.load is None


def test_flat_configurations(tmp_path: Path) -> None:
    prepared = PrepareConfig.from_flags(annotations="meta.json", output=tmp_path, height=16)
    clips = prepared.encoding.arguments
    assert (clips.sources.annotations, clips.clips.wanted.height) == (Path("meta.json"), 16)
    assert prepared.output == tmp_path
    converted = ConvertConfig.from_flags(source=("megatron", "runs/a"), target=["wan", tmp_path], verify=True)
    assert converted == ConvertConfig(source=("megatron", Path("runs/a")), target=("wan", tmp_path), verify=True)
    assert ConvertConfig.from_flags(**{"from": ("wan", "a"), "to": ("wan", "b")}).source == ("wan", Path("a"))


@pytest.mark.parametrize(("cls", "values", "words"), [
    (TrainConfig, {"data_pth": "x"}, "unknown key 'data_pth'; did you mean data_path?"),
    (TrainConfig, {"train_iters": "ten"}, "--train-iters"),
    (TrainConfig, {"bf16": 1}, "bf16 is 1; it must be true or false"),
    (TrainConfig, {"lr": (1, 2)}, r"lr is \(1, 2\); it must be a single value"),
    (TrainConfig, {"lr": None}, "lr has no value"),
    (TrainConfig, {"data_path": [("a", "b")]}, "it must be a list of single values"),
    (PrepareConfig, {"anotations": "x"}, "unknown key 'anotations'; did you mean annotations?"),
    (ConvertConfig, {"source": ("megatron", "a"), "target": ("wann", "b")}, "--to is 'wann'; it must be one of"),
    (ConvertConfig, {"source": ("megatron", "a")}, "to must be given"),
])
def test_mistakes_are_named(cls: type, values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls.from_flags(**values)  # type: ignore[attr-defined]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        TrainConfig.from_recipe(tmp_path / "none.yaml")
