"""`flashi2v train --online-encoding` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.layouts import metrics
from helpers.tiny_corpus import make_corpus

Train = Callable[..., int]
MODEL = (
    "--model", "tiny", "--num-layers", 1, "--hidden-size", 16, "--ffn-hidden-size", 16, "--num-attention-heads", 2,
    "--latent-channels", 4, "--text-dim", 16, "--train-iters", 3, "--global-batch-size", 4, "--micro-batch-size", 2,
)


def test_damaged_files_are_recorded_and_too_many_stop_the_run(
    run_command: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_corpus(tmp_path, 3, z_dim=4, text_dim=16), "--decode-workers", "1"]
    entries = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "text.mkv").write_text("no video")
    (tmp_path / "meta.json").write_text(json.dumps([*entries, {"path": "text.mkv", "cap": "x"},
                                                     {"path": "no\udce9\ud83d.mkv", "cap": "a \ud83d b"}]))
    assert run_command(*MODEL, "--online-encoding", *flags, "--save", tmp_path / "run") == 0
    assert len(metrics(tmp_path / "run")) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["reason"].split(":")[0].split("/")[-1] for row in rows} == {"text.mkv", "no\ufffd\ufffd.mkv"}
    assert all(row["damaged"] for row in rows)
    capsys.readouterr()
    assert run_command(*MODEL, "--online-encoding", *flags, "--max-bad-samples", 0) == 1
    told = capsys.readouterr().err
    assert "bad samples were met" in told and ("text.mkv: is not" in told or "no\ufffd\ufffd.mkv: there is" in told)
    recipe = tmp_path / "run" / "config.yaml"
    assert run_command("--config", recipe, "--dry-run") == 0


@pytest.mark.parametrize("flags, said", [
    (("--online-encoding",), "--annotations, --vae, --text-encoder, --tokenizer must be given"),
    (("--annotations", "meta.json"), "--annotations meta.json requires --online-encoding"),
    (("--encoding-cache", "x"), "--encoding-cache x requires --online-encoding"),
    (("--encoding-cache-mib", -1), "--encoding-cache-mib is -1"),
    (("--max-bad-samples", -1), "--max-bad-samples is -1"),
    (("--data-path", "a", "b"), "'a' must be a weight"),
])
def test_flags_that_cannot_work(
    run_command: Train, capsys: pytest.CaptureFixture[str], flags: tuple, said: str
) -> None:
    assert run_command("--model", "tiny", "--device", "cpu", *flags) == 2
    assert said in capsys.readouterr().err
