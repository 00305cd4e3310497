"""From annotations to a data set: right samples, resumable, shared between processes, nothing lost or doubled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_text_encoder, make_tiny_tokenizer, make_tiny_vae, make_video
from rich.console import Console

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.prepare import PrepareConfig
from megatron_flashi2v.config.recipe import from_values
from megatron_flashi2v.data import decoder
from megatron_flashi2v.data.annotations import read_annotations
from megatron_flashi2v.data.clips import Frames, load_frames
from megatron_flashi2v.data.preparation import Place, prepare
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.data.summary import require_samples, summary_table
from megatron_flashi2v.encoders.text import TextEncoder
from megatron_flashi2v.encoders.video_vae import VideoVAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, two videos, and annotations: 7 good ones, 4 of which fail in one way each."""
    root = tmp_path_factory.mktemp("world")
    make_tiny_vae(root / "vae")
    make_tiny_text_encoder(root / "text_encoder")
    make_tiny_tokenizer(root / "tokenizer")
    make_video(root / "one.mkv", 40, 40, 56)
    make_video(root / "two.mkv", 30, 40, 56)
    (root / "broken.mp4").write_bytes(b"no video")
    good = [{"path": "one.mkv", "cap": ["A dog runs!", "a red car"], "cut": [n, n + 12]} for n in range(0, 20, 4)]
    good += [{"path": "two.mkv", "cap": "the street"}, {"path": "two.mkv", "cap": "a person walks", "cut": [9, 29]}]
    bad = [
        {"path": "broken.mp4", "cap": "x"},
        {"path": "absent.mp4", "cap": "x"},
        {"path": "two.mkv"},
        {"path": 5, "cap": "x"},
    ]
    entries = [*good[:3], *bad[:2], *good[3:], *bad[2:]]
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


def config_of(world: Path, output: Path, **changes: Any) -> PrepareConfig:
    values = dict(
        annotations=world / "meta.json",
        output=output,
        vae=world / "vae",
        text_encoder=world / "text_encoder",
        tokenizer=world / "tokenizer",
        num_frames=5,
        height=16,
        width=24,
        fps=16.0,
        samples_per_shard=3,
        too_long_factor=10.0,
        text_length=6,
        decode_workers=0,
    )
    return from_values(PrepareConfig, values | changes)


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    output = world / "finished"
    prepare(config_of(world, output), place=Place(), device=CPU)
    return output


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but the summary and the shards' indices, which tell seconds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    told = [path for path in files if path.name == "summary.json" or path.match("shards/*.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path not in told}


def test_samples(world: Path, finished: Path) -> None:
    data = PreparedDataset(finished)
    assert len(data) == 7
    assert data.info.latent_shape == (4, 3, 4, 6)
    assert (data.info.text_dim, data.info.text_length, data.info.text_cleaning) == (16, 6, "full")
    assert (data.info.frames, data.info.height, data.info.width, data.info.fps) == (5, 16, 24, 16.0)
    assert data.info.vae["temporal_stride"] == 2 and data.info.text_encoder["text_dim"] == 16
    vae = VideoVAE.load(world / "vae", "cpu")
    text = TextEncoder.load(world / "text_encoder", world / "tokenizer", 6, "cpu")
    entries = {entry.key: entry for entry in read_annotations(world / "meta.json")[0]}
    kept = [key for key, entry in entries.items() if entry.index not in (3, 4, 9)]
    assert [data[index].key for index in range(len(data))] == kept
    settings = config_of(world, finished).encoding.arguments.clips
    for index in range(len(data)):
        sample, record = data[index], data.record(index)
        frames = load_frames(entries[sample.key], settings, 1234)
        assert isinstance(frames, Frames)
        clip = frames.clip()
        assert record["frames"] == list(clip.indices) and record["settings"] == data.fingerprint
        assert record["caption_raw"] in (entries[sample.key].captions or ())
        assert sample.caption == record["caption_raw"].lower()
        assert sample.latents_CTHW.dtype == torch.float32 and sample.text_rows_LD.dtype == torch.bfloat16
        assert torch.equal(sample.latents_CTHW, vae.encode(clip.video_CTHW[None])[0])
        assert torch.equal(sample.text_rows_LD, text.encode([sample.caption])[0].bfloat16())
    assert torch.equal(data.empty_text_rows_LD, text.encode([""])[0].bfloat16())


def test_a_vae_in_bf16(world: Path, finished: Path, tmp_path: Path) -> None:
    """Its latents are stored in fp32, near those of the whole precision, and the data set is another one."""
    prepare(config_of(world, tmp_path / "bf16", vae_dtype="bfloat16"), place=Place(), device=CPU)
    rounded, exact = PreparedDataset(tmp_path / "bf16"), PreparedDataset(finished)
    assert rounded.info.vae["dtype"] == "bfloat16" and rounded.fingerprint != exact.fingerprint
    for index in range(len(exact)):
        ours, expected = rounded[index].latents_CTHW, exact[index].latents_CTHW
        assert ours.dtype == torch.float32
        assert 0 < (ours - expected).norm() < 0.03 * expected.norm()


def test_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["entries"], summary["kept"], summary["shards"]) == (11, 7, 3)
    counts = {reason: group["count"] for reason, group in summary["dropped"].items()}
    assert counts == {"unreadable": 1, "missing_file": 1, "no_cap": 1, "malformed_entry": 1}
    assert "broken.mp4" in summary["dropped"]["unreadable"]["examples"][0]["detail"]
    assert summary["bytes"] == sum(path.stat().st_size for path in (finished / "shards").glob("*.tar"))
    rows = [json.loads(line) for line in (finished / "dropped.jsonl").read_text().splitlines()]
    assert [(row["entry"], row["reason"]) for row in rows] == [
        (3, "unreadable"),
        (4, "missing_file"),
        (9, "no_cap"),
        (10, "malformed_entry"),
    ]


def test_a_second_run_loads_no_model(world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished data set needs no encoder")

    monkeypatch.setattr(VideoVAE, "load", refuse)
    monkeypatch.setattr(TextEncoder, "load", refuse)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    summary = prepare(config_of(world, finished), place=Place(), device=CPU)
    assert summary is not None and summary["kept"] == 7
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_work(world: Path, finished: Path, tmp_path: Path, world_size: int) -> None:
    output = tmp_path / "shared"
    shards, wrote = output / "shards", {}
    calls = 0

    def the_others() -> None:
        """Rank 0's first barrier stands after it claimed the folder: the others work while it waits there."""
        nonlocal calls
        calls += 1
        for rank in range(1, world_size) if calls == 1 else ():
            before = {path.name for path in shards.glob("*.tar")}
            place = Place(rank=rank, world_size=world_size)
            assert prepare(config_of(world, output), place=place, device=CPU) is None
            wrote[rank] = {path.name for path in shards.glob("*.tar")} - before

    place = Place(rank=0, world_size=world_size, barrier=the_others)
    summary = prepare(config_of(world, output), place=place, device=CPU)
    assert summary is not None and summary["kept"] == 7
    assert calls == 2
    assert wrote == {rank: {f"shard-{rank:06d}.tar"} if rank < 3 else set() for rank in range(1, world_size)}
    assert bytes_of(output) == bytes_of(finished)


def test_a_killed_run_is_continued(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, config = tmp_path / "killed", config_of(world, tmp_path / "killed")
    whole = decoder.load_frames
    # Killed before the n-th clip, again and again, each time a little later.
    for kill_at in (1, 4, 5, 2):
        calls = 0

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > kill_at:  # noqa: B023
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        monkeypatch.setattr(decoder, "load_frames", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, place=Place(), device=CPU)
        assert not (output / "dataset.json").exists()
        assert all(path.with_suffix(".tar").exists() for path in (output / "shards").glob("shard-*.json"))
        with pytest.raises(DataError, match="no finished data set"):
            PreparedDataset(output)
    monkeypatch.setattr(decoder, "load_frames", whole)
    (output / "shards" / ".shard-000002.999.tmp").write_bytes(b"left by a kill")
    (output / "shards" / "shard-000002.tar").write_bytes(b"a tar without an index")
    prepare(config, place=Place(), device=CPU)
    assert bytes_of(output) == bytes_of(finished)


def test_damaged_shards_are_made_again(world: Path, finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "damaged"))
    (output / "shards" / "shard-000001.tar").unlink()
    os.truncate(output / "shards" / "shard-000000.tar", 1000)
    (output / "shards" / "shard-000002.json").write_text("{")
    prepare(config_of(world, output), place=Place(), device=CPU)
    assert bytes_of(output) == bytes_of(finished)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, "seed 1234 there, 5 now"),
        ({"height": 20}, "height 16 there, 20 now"),
        ({"text_cleaning": "light"}, "text_cleaning full there, light now"),
        ({"frame_picking": "index"}, "frame_picking time there, index now"),
        ({"picture": "stored"}, "picture shown there, stored now"),
    ],
)
def test_other_settings_are_refused(world: Path, finished: Path, change: dict[str, Any], said: str) -> None:
    before = bytes_of(finished)
    with pytest.raises(ConfigError, match=f"{said}.*--fresh"):
        prepare(config_of(world, finished, **change), place=Place(), device=CPU)
    assert bytes_of(finished) == before


OLD_SETTINGS = {
    "pipeline_version", "num_frames", "height", "width", "fps", "min_aspect", "max_aspect", "too_long_factor",
    "min_motion", "max_motion", "filter_rules", "interpolation", "text_cleaning", "text_encoder_dtype", "text_length",
    "seed", "samples_per_shard", "min_pixels", "vae", "text_encoder", "tokenizer", "entries", "annotations",
}  # fmt: skip
"""What the first version's settings.json names."""


def test_a_folder_of_the_first_version_is_continued_as_it_was_begun(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the old version did has the old settings, and what it left is finished in the same way."""
    output = tmp_path / "old"
    prepare(config_of(world, output, frame_picking="index", picture="stored"), place=Place(), device=CPU)
    assert json.loads((output / "settings.json").read_text()).keys() == OLD_SETTINGS
    whole = bytes_of(output)
    for name in ("dataset.json", "summary.json", "shards/shard-000001.tar", "shards/shard-000001.json"):
        (output / name).unlink()
    caplog.set_level("INFO")
    prepare(config_of(world, output), place=Place(), device=CPU)
    assert bytes_of(output) == whole
    assert "old was begun with --frame-picking index --picture stored, and is continued so" in caplog.text
    with pytest.raises(ConfigError, match="seed 1234 there, 5 now"):
        prepare(config_of(world, output, seed=5), place=Place(), device=CPU)


def test_new_settings_name_what_the_first_version_did_not_have(finished: Path) -> None:
    settings = json.loads((finished / "settings.json").read_text())
    assert settings.keys() - OLD_SETTINGS == {"frame_picking", "picture"}
    assert (settings["frame_picking"], settings["picture"]) == ("time", "shown")


def test_other_weights_are_other_settings(world: Path, finished: Path, tmp_path: Path) -> None:
    vae = make_tiny_vae(tmp_path / "vae", seed=1)
    with pytest.raises(ConfigError, match="vae has changed"):
        prepare(config_of(world, finished, vae=vae), place=Place(), device=CPU)
    same = Path(shutil.copytree(world / "vae", tmp_path / "same"))
    assert prepare(config_of(world, finished, vae=same, device="cpu"), place=Place(), device=CPU) is not None


def test_fresh_starts_over_and_spares_the_rest(world: Path, finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "fresh"))
    (output / "notes.txt").write_text("mine")
    (output / "shards" / "mine.txt").write_text("mine")
    prepare(config_of(world, output, samples_per_shard=20, fresh=True), place=Place(), device=CPU)
    assert (output / "notes.txt").exists() and (output / "shards" / "mine.txt").exists()
    assert sorted(path.name for path in (output / "shards").glob("*.tar")) == ["shard-000000.tar"]
    again, before = PreparedDataset(output), PreparedDataset(finished)
    assert [again[n].key for n in range(7)] == [before[n].key for n in range(7)]
    assert all(torch.equal(again[n].latents_CTHW, before[n].latents_CTHW) for n in range(7))


def test_nothing_kept_is_an_error(world: Path, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps([{"path": str(world / "broken.mp4"), "cap": "x"}]))
    returned = prepare(config_of(world, tmp_path / "out", annotations=meta), place=Place(), device=CPU)
    assert returned is not None
    with pytest.raises(DataError, match=r"none of 1 annotations.*unreadable 1.*broken\.mp4"):
        require_samples(returned)
    assert not (tmp_path / "out" / "dataset.json").exists()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == returned and summary["kept"] == 0 and summary["dropped"]["unreadable"]["count"] == 1


def test_rules_can_be_corrected_or_the_references(world: Path, tmp_path: Path) -> None:
    """The size of the file is the floor; what is annotated is what either set of rules goes by."""
    annotated = {"path": str(world / "one.mkv"), "cap": "a dog", "fps": 16,
                 "resolution": {"height": 40, "width": 56}, "num_frames": 40}
    other_aspect = {**annotated, "resolution": {"height": 56, "width": 84}}  # a sample's: the reference asks no more
    entries = [
        {"path": str(world / "one.mkv"), "cap": "a dog"},
        annotated,
        {**other_aspect, "motion": 1.5},
        {**other_aspect, "cut": [0, 3]},
    ]
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    found = {}
    for rules in ("corrected", "reference"):
        config = config_of(world, tmp_path / rules, annotations=tmp_path / "meta.json", filter_rules=rules,
                           min_pixels=40 * 56)
        summary = prepare(config, place=Place(), device=CPU)
        assert summary is not None
        found[rules] = {reason: group["count"] for reason, group in summary["dropped"].items()}
        found[rules]["kept"] = summary["kept"]
    assert found["corrected"] == {"too_fast": 1, "too_short": 1, "kept": 2}
    assert found["reference"] == {"no_resolution": 1, "res_too_small": 1, "too_slow": 1, "kept": 1}


def test_strict_stops_at_the_first_damage(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="entry 10: path is 5"):
        prepare(config_of(world, tmp_path / "out", strict=True), place=Place(), device=CPU)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps([{"path": str(world / "broken.mp4"), "cap": "x"}]))
    with pytest.raises(DataError, match=r"broken\.mp4: is not a readable video"):
        prepare(config_of(world, tmp_path / "out", annotations=meta, strict=True), place=Place(), device=CPU)
    assert list((tmp_path / "out" / "shards").iterdir()) == []


def test_sizes_are_checked_before_decoding(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_frames is 4"):
        prepare(config_of(world, tmp_path / "out", num_frames=4), place=Place(), device=CPU)
    # A flag that was wrong before anything was made may be corrected without --fresh.
    assert prepare(config_of(world, tmp_path / "out"), place=Place(), device=CPU) is not None


def test_foreign_folders_are_refused(world: Path, finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "foreign"))
    (output / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"no settings\.json"):
        prepare(config_of(world, output), place=Place(), device=CPU)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        prepare(config_of(world, tmp_path / "file"), place=Place(), device=CPU)


def test_one_release_folder_gives_all_three_models(world: Path, finished: Path) -> None:
    """The data set is that of the subfolders: nothing is left to do."""
    release = {name: world for name in ("vae", "text_encoder", "tokenizer")}
    before = bytes_of(finished)
    assert prepare(config_of(world, finished, **release), place=Place(), device=CPU) is not None
    assert bytes_of(finished) == before


def test_latents_that_are_not_finite_are_dropped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VideoVAE.encode
    monkeypatch.setattr(VideoVAE, "encode", lambda self, video: whole(self, video) / 0.0)
    summary = prepare(config_of(world, tmp_path / "out"), place=Place(), device=CPU)
    assert summary is not None and summary["kept"] == 0 and summary["dropped"]["not_finite"]["count"] == 7


def test_captions_that_cleaning_empties_are_told_once_and_counted(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = ["一只猫坐在沙发上", "a dog runs", "开车 hd", "a 猫 walks"]
    entries = [
        {"path": str(world / "one.mkv"), "cap": text, "cut": [n, n + 12]} for n, text in enumerate(captions)
    ]
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    found = {}
    for cleaning in ("full", "light"):
        caplog.clear()
        config = config_of(world, tmp_path / cleaning, annotations=tmp_path / "meta.json", text_cleaning=cleaning,
                           samples_per_shard=2)
        found[cleaning] = prepare(config, place=Place(), device=CPU)
        told = [record.getMessage() for record in caplog.records if "--text-cleaning light" in record.getMessage()]
        assert len(told) == (cleaning == "full")
        assert cleaning == "light" or "letters of 1: '一只猫坐在沙发上' becomes" in told[0]
    assert [group["emptied_captions"]["count"] for group in found.values() if group] == [1, 0]
    shown = Console(width=200)
    with shown.capture() as capture:
        shown.print(summary_table(found["full"] or {}, tmp_path))
    assert "captions nearly emptied" in capture.get() and "--text-cleaning light keeps them" in capture.get()
    assert "captions nearly emptied" in (tmp_path / "full" / "report.html").read_text()
    assert "captions nearly emptied" not in (tmp_path / "light" / "report.html").read_text()
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    del summary["emptied_captions"]  # as older versions wrote it
    (tmp_path / "full" / "summary.json").write_text(json.dumps(summary))
    again = prepare(config_of(world, tmp_path / "full", annotations=tmp_path / "meta.json", samples_per_shard=2),
                    place=Place(), device=CPU)
    assert again == summary
