"""Recipes and flags: what is read, what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_flashi2v.config.convert import ConvertConfig
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.layout import model_ranks
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import flat_values, parse
from megatron_flashi2v.config.rules import check_train
from megatron_flashi2v.config.sample import SampleConfig
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.models.presets import PRESETS, resolve_model

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "recipes").glob("*.yaml"))


def read(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, prog="test", description="")


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: 1.3b\nlr: 1e-3\nbf16: true\nsequence_parallel: true\nnum-layers: 8\nsave: runs/x\n")
    config = read("--config", str(recipe), "--lr", "0.5", "--no-bf16", "--tensor-model-parallel-size", "2")
    assert (config.optimizer.lr, config.batch.bf16, config.parallel.tensor_model_parallel_size) == (0.5, False, 2)
    assert (config.model.model, config.model.num_layers) == ("1.3b", 8)
    assert config.parallel.sequence_parallel and config.checkpoint.save == Path("runs/x")


def test_written_values_read_back_as_the_same_configuration(tmp_path: Path) -> None:
    config = read("--lr", "1.2345678901234567e-5", "--save", "runs/y", "--bf16", "--save-interval", "7")
    recipe = tmp_path / "config.yaml"
    recipe.write_text(yaml.safe_dump(flat_values(config)))
    assert read("--config", str(recipe)) == config


@pytest.mark.parametrize("text, words", [
    ("micro_batch_sise: 2", ["micro_batch_sise", "did you mean micro_batch_size"]),
    ("- a\n- b", ["must be a mapping"]),
    ("lr: [1", ["not valid YAML: line 1, column 7"]),
    ("lr: fast", ["--lr", "'fast'"]),
    ("model: yes", ["model is True; it must not be true or false: if it is a word, quote it"]),
    ("conditioning: [flashi2v]", ["conditioning is ['flashi2v']; it must be a single value"]),
    ("data_path: [[a]]", ["data_path is [['a']]; it must be a list of single values"]),
    ("bf16: yes please", ["bf16 is 'yes please'; it must be true or false"]),
    ("sequence_parallel: 1", ["sequence_parallel is 1; it must be true or false"]),
    ("lr:", ["lr has no value"]),
    ("model: {name: tiny}", ["model is {'name': 'tiny'}; it must be a single value"]),
    ("lr: [1, 2]", ["lr is [1, 2]"]),
    ("3: 4", ["unknown key 3"]),
    ("!!python/object/apply:os.system [echo]", ["not valid YAML"]),
])
def test_bad_recipe_is_one_clear_error(tmp_path: Path, text: str, words: list[str]) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as error:
        read("--config", str(recipe))
    assert str(recipe) in str(error.value) and all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_missing_recipe_names_the_file() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        read("--config", "nowhere.yaml")


@pytest.mark.parametrize("argv", [["--lr", "1", "--config"], ["--config", "--lr", "1"], ["--config="]])
def test_config_without_its_file(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="--config: the recipe's path is missing"):
        read(*argv)


def test_the_last_config_counts(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "lr: 1\nseed: 5"), ("b.yaml", "lr: 2")):
        (tmp_path / name).write_text(text)
    config = read("--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml")
    assert (config.optimizer.lr, config.batch.seed) == (2.0, TrainConfig().batch.seed)


def test_config_stands_anywhere_and_its_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("save: ~/x\ndata_path: [~/d]\nvalid_data_path: [1, ~, 1, '~/v']\n")
    with pytest.raises(ConfigError, match="valid_data_path is .* list of single values"):
        read("--seed", "1", "--config=~/a.yaml", "--lr", "1")
    (tmp_path / "a.yaml").write_text("save: ~/x\ndata_path: [~/d]\nload_weights: wan:~/w\n")
    config = read("--seed", "1", "--config=~/a.yaml", "--lr", "1")
    assert config.checkpoint.save == tmp_path / "x" and config.data.data_path == (f"{tmp_path}/d",)
    assert config.checkpoint.load_weights == f"wan:{tmp_path}/w" and config.optimizer.lr == 1.0


def test_a_recipe_for_every_command(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("from: [wan, a]\nto: [megatron, ~/b]\nverify: true\nnum-attention-heads: 4\n")
    convert = parse(ConvertConfig, ["--config", str(recipe), "--to", "diffusers", "c"], prog="", description="")
    assert convert.source == ("wan", Path("a")) and convert.target == ("diffusers", Path("c"))
    assert convert.verify and convert.num_attention_heads == 4
    recipe.write_text("load: r\nvae: v\ntext_encoder: t\ntokenizer: k\nprompt: -a dog\noutput: a.mp4\nshift: 3\n")
    sample = parse(SampleConfig, ["--config", str(recipe), "--output", "b.mp4"], prog="", description="")
    assert (sample.prompt, sample.output, sample.sampler.shift) == ("-a dog", Path("b.mp4"), 3.0)
    recipe.write_text("annotations: a.json\nnum_frames: 9\nmin_pixels: null\nstrict: true\n")
    prepare = parse(PrepareConfig, ["--config", str(recipe)], prog="", description="")
    assert prepare.encoding.arguments.clips.wanted.num_frames == 9 and prepare.strict


def test_from_python(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1e-3\ntrain_iters: 7\n")
    config = TrainConfig.from_recipe(recipe, train_iters=9, save="runs/x", data_path=["a"], profile_ranks=(1, 2))
    assert (config.optimizer.lr, config.batch.train_iters, config.checkpoint.save) == (1e-3, 9, Path("runs/x"))
    assert config.data.data_path == ("a",) and config.watch.profile_ranks == (1, 2)
    assert TrainConfig.from_flags() == TrainConfig()
    assert type(TrainConfig.from_flags(lr=1).optimizer.lr) is float
    with pytest.raises(ConfigError, match="unknown key 'train_iter'; did you mean train_iters"):
        TrainConfig.from_flags(train_iter=9)
    with pytest.raises(ConfigError, match="^from, to must be given$"):
        ConvertConfig.from_flags(verify=True)


def test_every_preset_has_its_recipe() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(PRESETS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(recipe: Path) -> None:
    config = read("--config", str(recipe))
    assert config.model.model == recipe.stem
    check_train(config, resolve_model(config.model), model_ranks(config.parallel))
