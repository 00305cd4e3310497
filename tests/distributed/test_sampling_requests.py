"""``flashi2v sample --requests``: each video is the same whatever the replicas, the layout and the interruptions."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import av
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.sampling_models import make_sampling_models, sample_words
from safetensors.torch import load_file

from megatron_flashi2v.cli.main import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sampling_models(tmp_path_factory.mktemp("models"))
    write_requests(folder / "requests.jsonl", 6)
    return folder


def write_requests(path: Path, count: int) -> None:
    prompts = ["a dog runs", "a red car drives", "a person walks"]
    rows = [
        {"id": f"r{number}", "image": f"image{number % 3}.png", "prompt": prompts[number % 3], "seeds": [0, 7]}
        for number in range(count)
    ]
    rows[1] |= {"negative_prompt": "", "height": 24, "num_frames": 3}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words(models: Path, output: Path, *flags: object) -> list[str]:
    return sample_words(models, output, "--requests", models / "requests.jsonl", "--latents", *flags)


def sample(rank: int, argv: list[str]) -> None:
    assert main(argv) == 0


def latents(folder: Path) -> dict[str, torch.Tensor]:
    return {path.stem: load_file(path)["latents_BCTHW"] for path in folder.glob("*.safetensors")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("r*")}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of one process that nothing disturbs."""
    output = tmp_path_factory.mktemp("one")
    assert main(words(models, output)) == 0
    found = latents(output)
    assert len(found) == 12 and found["r1-0"].shape[2:] == (2, 6, 6) and found["r0-0"].shape[2:] == (3, 4, 6)
    flat = [value.flatten()[:100] for value in found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
    return found


def test_two_replicas_and_what_a_killed_run_left(
    models: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run_ranks(sample, 2, models, words(models, tmp_path))
    require_equal(latents(tmp_path), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["sampling.json", *(f"{name}{suffix}" for name in expected for suffix in (".mp4", ".safetensors"))]
    )
    with av.open(str(tmp_path / "r1-7.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == 3 and pictures[0].shape == (24, 24, 3)

    for name in ("r0-0", "r2-7", "r4-0"):  # killed before the video, and in the middle of it
        (tmp_path / f"{name}.mp4").unlink()
    (tmp_path / "r4-0.safetensors").unlink()
    (tmp_path / ".r4-0.mp4.0123abcd.partial").write_bytes(b"half")
    kept = {name: stamp for name, stamp in stamps(tmp_path).items() if not name.startswith(("r0-0", "r2-7", "r4-0"))}
    assert main(words(models, tmp_path)) == 0
    require_equal(latents(tmp_path), expected)
    assert len(kept) == 18 and kept.items() <= stamps(tmp_path).items()
    assert not list(tmp_path.glob(".*"))


LAYOUTS = {
    "guidance2-replicas2": (4, ["--guidance-parallel-size", "2"]),
    "guidance2-pp2": (4, ["--guidance-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "tp2-replicas2": (4, ["--tensor-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(models: Path, expected: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    processes, flags = LAYOUTS[name]
    lines = (models / "requests.jsonl").read_text().splitlines()[:2]
    (models / "some.jsonl").write_text("\n".join(lines))
    run_ranks(sample, processes, models, words(models, tmp_path, "--requests", models / "some.jsonl", *flags))
    found = latents(tmp_path)
    assert len(found) == len(list(tmp_path.glob("*.mp4"))) == 4
    for video, value in found.items():
        assert (value - expected[video]).abs().max() <= 1e-5 * expected[video].abs().max(), video


def test_one_video_of_divided_guidance(models: Path, tmp_path: Path) -> None:
    one = ("--image", models / "image0.png", "--prompt", "a dog runs", "--seed", 3, "--latents")
    assert main(sample_words(models, tmp_path / "a.mp4", *one)) == 0
    run_ranks(sample, 2, models, sample_words(models, tmp_path / "b.mp4", *one, "--guidance-parallel-size", 2))
    first, second = (load_file(tmp_path / f"{name}.safetensors")["latents_BCTHW"] for name in "ab")
    assert (first - second).abs().max() <= 1e-5 * first.abs().max()


def test_a_bad_picture_is_told_by_all_ranks_alike(models: Path, tmp_path: Path) -> None:
    bad = models / "bad.png"
    bad.write_bytes(b"no picture")
    path = models / "bad.jsonl"
    path.write_text('{"id": "a", "image": "image0.png", "prompt": "x"}\n{"id": "b", "image": "bad.png", "prompt": "x"}')
    run_ranks(refused, 2, models, words(models, tmp_path, "--requests", path), f"{path}: line 2: image {bad}: neither")
    assert not list(tmp_path.iterdir())


def refused(rank: int, argv: list[str], said: str) -> None:
    from megatron_flashi2v.config.errors import UserError
    from megatron_flashi2v.config.recipe import parse
    from megatron_flashi2v.config.sample import SampleConfig
    from megatron_flashi2v.sampling.many import sample_requests

    with pytest.raises(UserError) as error:
        sample_requests(parse(SampleConfig, argv[1:], prog="", description=""))
    assert said in str(error.value)


@pytest.mark.long
def test_forty_requests_killed_twice_at_random(models: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    write_requests(many, 40)
    many.write_text(many.read_text().replace('"image": "', f'"image": "{models}/'))
    assert main(words(models, tmp_path / "one", "--requests", many)) == 0
    expected, output = latents(tmp_path / "one"), tmp_path / "two"
    seed = random.SystemRandom().randrange(1000)
    draw = random.Random(seed)
    argv = words(models, output, "--requests", many)
    finished: dict[str, tuple[int, int]] = {}
    for least in sorted(draw.sample(range(5, 75), 2)):
        late = Late(output, least, draw.random() * 0.3)
        run_ranks(sample, 2, tmp_path, argv, timeout=1200, kill_when=late)
        assert finished.items() <= stamps(output).items(), f"draw {seed}"
        finished = {name: stamp for name, stamp in stamps(output).items() if (output / name).suffix == ".mp4"}
        for name in finished:  # each can be played
            with av.open(str(output / name)) as container:
                assert len(list(container.decode(video=0))) in (3, 5)
    assert 5 <= len(finished) < 80, f"draw {seed}: killed too late"
    run_ranks(sample, 2, tmp_path, argv, timeout=1200)
    assert finished.items() <= stamps(output).items(), f"draw {seed}"
    require_equal(latents(output), expected)
    assert not list(output.glob(".*"))


class Late:
    """True a little after so many videos are there."""

    def __init__(self, output: Path, videos: int, seconds: float) -> None:
        self._output, self._videos, self._seconds = output, videos, seconds
        self._since: float | None = None

    def __call__(self) -> bool:
        if self._since is None and len(list(self._output.glob("*.mp4"))) >= self._videos:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since > self._seconds
