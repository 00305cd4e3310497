"""The output folder of `prepare`: whose it is, before anything is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import from_values
from megatron_flashi2v.data.continuation import require_own
from megatron_flashi2v.data.preparation import WRITTEN, Place, prepare

OURS = {
    "settings.json": {"pipeline_version": 1},
    "dataset.json": {"format": "megatron_flashi2v-dataset"},
    "shards/shard-000003.json": {"format": "megatron_flashi2v-shard"},
}


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", [
    *OURS, "summary.json", "dropped.jsonl", "report.html", "empty_text.safetensors", ".nv-meta/dataset.yaml",
    "shards/shard-000000.tar",
])
def test_what_prepare_did_not_write_it_does_not_replace(tmp_path: Path, name: str, fresh: bool) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": true}')
    values = {flag: tmp_path / "absent" for flag in ("annotations", "vae", "text_encoder", "tokenizer")}
    config = from_values(PrepareConfig, {**values, "output": tmp_path / "out", "fresh": fresh})
    with pytest.raises(ConfigError, match=f"out: {name} is there already, and .* did not write it"):
        prepare(config, place=Place(), device=torch.device("cpu"))
    assert files_in(tmp_path / "out") == {name: '{"mine": true}'}


@pytest.mark.parametrize("text", ['{"font": 12}', "[1]", "not JSON"])
@pytest.mark.parametrize("beside", ["dataset.json", "shards/shard-000003.json"])
def test_settings_of_somebody_else_beside_our_data_stay(tmp_path: Path, text: str, beside: str) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / beside).write_text(json.dumps(OURS[beside]))
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.json is there already"):
        require_own(tmp_path, WRITTEN)


@pytest.mark.parametrize("name", OURS)
def test_what_prepare_wrote_is_its_own(tmp_path: Path, name: str) -> None:
    require_own(tmp_path / "absent", WRITTEN)
    (tmp_path / "shards").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    require_own(tmp_path, WRITTEN)
    (tmp_path / name).write_text(json.dumps(OURS[name]))
    (tmp_path / "report.html").write_text("ours")
    require_own(tmp_path, WRITTEN)
