"""``flashi2v prepare`` by two processes: the same shards as by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video

from megatron_flashi2v.data.prepared import PreparedDataset


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mkv", 30, 40, 56)
    entries = [{"path": "v.mkv", "cap": "a dog", "cut": [n, n + 9]} for n in range(5)]
    (tmp_path / "meta.json").write_text(json.dumps([*entries, {"path": "gone.mp4", "cap": "x"}]))
    flags = ["--annotations", tmp_path / "meta.json", "--vae", make_tiny_vae(tmp_path / "vae")]
    flags += ["--text-encoder", make_tiny_text_encoder(tmp_path / "text_encoder")]
    flags += ["--tokenizer", make_tiny_tokenizer(tmp_path / "tokenizer"), "--device", "cpu", "--text-length", 6]
    flags += ["--num-frames", 5, "--height", 16, "--width", 24, "--samples-per-shard", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for name, count in (("alone", 1), ("shared", 2)):
        command = [*torchrun, count, "-m", "megatron_flashi2v", "prepare", *flags, "--output", tmp_path / name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("dropped: missing_file") == 1  # rank 0 alone tells
        assert "gone.mp4: there is no such file" in done.stderr
    alone, shared = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "shards").glob("*.tar")}
        for name in ("alone", "shared")
    )
    assert len(alone) == 3 and shared == alone
    assert len(PreparedDataset(tmp_path / "shared")) == 5
    assert not any(path.name.startswith(".") for path in (tmp_path / "shared" / "shards").iterdir())
