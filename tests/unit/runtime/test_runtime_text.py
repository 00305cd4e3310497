"""Text from outside: what may be written, and what may be shown."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_flashi2v.cli.errors import tell_error
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.runtime.files import append_jsonl, atomic_write_json, atomic_write_text
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.runtime.text import encodable, shown

ODD = "a \ud83d b \udce9"


def test_all_that_is_written_has_a_mark_for_what_has_no_bytes(tmp_path: Path) -> None:
    assert encodable(ODD) == "a \ufffd b \ufffd" and encodable("\U0001f431 一只猫 é") == "\U0001f431 一只猫 é"
    atomic_write_text(tmp_path / "a.txt", ODD)
    atomic_write_json(tmp_path / "a.json", {ODD: [ODD]})
    append_jsonl(tmp_path / "a.jsonl", {"reason": ODD})
    append_jsonl(tmp_path / "a.jsonl", {"reason": "next"})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == encodable(ODD)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {encodable(ODD): [encodable(ODD)]}
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"reason": encodable(ODD)}, {"reason": "next"}]


@pytest.mark.parametrize(("text", "expected"), [
    ("https://host/a.mp4?X-Amz-Signature=KEY&X-Amz-Date=1: gone", "https://host/a.mp4?...: gone"),
    ("/data/https:/host/a.mp4?sv=1&sig=KEY", "/data/https:/host/a.mp4?..."),
    ('{"path": "https://host/a.mp4?token=KEY"}', '{"path": "https://host/a.mp4?..."}'),
    ("s3://user:KEY@bucket/a.mp4 is gone", "s3://bucket/a.mp4 is gone"),
    ("https://host/my clip.mp4?X-Amz-Credential=KEY&b=1", "https://host/my clip.mp4?X-Amz-Credential=...&b=1"),
    ("what? a=b.mp4, and C: too", "what? a=b.mp4, and C: too"),
    ("see https://host/page and /data/why?.mp4", "see https://host/page and /data/why?.mp4"),
])
def test_addresses_are_shown_without_their_keys(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_the_log_and_the_last_word_show_no_keys(capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://host/a.mp4?X-Amz-Signature=KEY"
    with logging_to_stderr():
        logging.getLogger("megatron_flashi2v.test").warning("cannot read %s", address)
        try:
            raise OSError(address)
        except OSError:
            logging.getLogger("megatron_flashi2v.test").exception("failed")
    assert tell_error("prepare", UserError(f"{address}: gone \ud83d")) == UserError.exit_code
    told = capsys.readouterr().err
    assert told.count("https://host/a.mp4?...") == 3 and "KEY" not in told
