"""Strings from outside that hold what cannot be encoded, keys, or markup: one clip's trouble, and nobody else's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_corpus import make_corpus

from megatron_flashi2v.cli.main import main
from megatron_flashi2v.data.fingerprint import folder_hash
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.data.reasons import Drop

SIGNED = "https://host/b/x.mp4?X-Amz-Signature=SECRET&b=1"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set from annotations of which every other one is odd."""
    root = tmp_path_factory.mktemp("odd")
    flags = make_corpus(root, 1, z_dim=4, text_dim=16)
    shutil.copy(root / "one.mkv", os.fsencode(root) + b"/no\xe9.mkv")
    shutil.copy(root / "one.mkv", root / "<b>.mkv")
    good = {"path": "one.mkv", "cap": "a dog", "cut": [0, 20]}
    entries: list[dict[str, Any]] = [
        {**good, "cap": "a \ud83d b"},
        {**good, "path": "no\udce9.mkv"},
        {**good, "path": "<b>.mkv", "cap": "<script>alert('x')</script> a cat"},
        {**good, "path": "gone\udce9.mp4"},
        {**good, "path": "x\ud83d.mkv"},
        {**good, "path": "y" * 300 + ".mkv"},
        {**good, "path": SIGNED},
        {**good, "fps": 10**400},
        {**good, "path": "z" * 5000},
        {**good, "cap": {"\ud83d": SIGNED}},
        {**good, "cap": "w" * 200_000},
    ]
    (root / "meta.json").write_text(json.dumps(entries))
    assert main(["prepare", *flags, "--text-cleaning", "light", "--output", str(root / "data")]) == 0
    return root / "data"


def test_what_can_be_read_is_kept_and_written_with_a_mark(prepared: Path) -> None:
    data = PreparedDataset(prepared)
    records = [data.record(index) for index in range(len(data))]
    assert [(row["entry"], row["source"], row["caption_raw"]) for row in records] == [
        (0, "one.mkv", "a \ufffd b"),
        (1, "no\ufffd.mkv", "a dog"),
        (2, "<b>.mkv", "<script>alert('x')</script> a cat"),
    ]
    assert records[0]["caption"] == "a \ufffd b"


def test_what_cannot_has_a_reason(prepared: Path) -> None:
    rows = [json.loads(line) for line in (prepared / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["entry"], row["reason"]) for row in rows] == [
        *((number, "missing_file") for number in (3, 4, 5, 6)),
        *((number, "malformed_entry") for number in (7, 8, 9, 10)),
    ]
    assert [row["path"] for row in rows[:2]] == ["gone\ufffd.mp4", "x\ufffd.mkv"]
    assert "gone\ufffd.mp4: there is no such file" in rows[0]["detail"]
    assert "path has 5,000 characters" in rows[5]["detail"] and "cap has 200,000" in rows[7]["detail"]


def test_no_key_is_kept_anywhere(prepared: Path) -> None:
    written = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    assert [path for path, data in written.items() if b"SECRET" in data] == []
    assert b"https://host/b/x.mp4?..." in written[prepared / "dropped.jsonl"]


def test_the_report_shows_markup_as_text(prepared: Path) -> None:
    page = (prepared / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in page and "<script" not in page
    assert "&lt;b&gt;.mkv" in page and "<b>.mkv" not in page


def test_a_model_folder_may_hold_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.bin").write_bytes(b"1")
    before = folder_hash(tmp_path / "plain", "VAE")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/plain/caf\xe9")).write_bytes(b"2")
    assert folder_hash(tmp_path / "plain", "VAE") != before


def test_a_reason_shows_no_key_whoever_words_it() -> None:
    assert "SECRET" not in Drop("unreadable", "https://user:word@host/a.mp4?X-Amz-Signature=SECRET: damaged").detail
