"""Figures, conclusions and page of examples/paradigms: what is measured, and what is said of it in every outcome."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from paradigms.classifier import FEATURES, Classifier, look, train_classifier, true_steps
from paradigms.conclusions import conclude, matched
from paradigms.measure import chance, measure_samples
from paradigms.page import write_page
from paradigms.settings import SETS
from paradigms.world import Board, Clip, make_clip

BOARD = Board(cells=4, frames=5)
PARADIGMS = ("flashi2v", "repeat_concat", "inpainting")


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(BOARD, "in", 0, f"held-{number}") for number in range(48)]


@pytest.fixture(scope="module")
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


def measured(clips: list[Clip], network: Classifier, frames: np.ndarray) -> dict[str, Any]:
    return measure_samples(clips, frames, network, chunk_frames=2, resamples=50)


def test_true_clips_have_no_distance(clips: list[Clip], network: Classifier) -> None:
    figures = measured(clips, network, np.stack([clip.frames_THWC for clip in clips]))
    assert figures["frechet"]["mean"] == [0, 0] and figures["chunks"] == [[1, 2], [3, 4]]
    assert figures["frozen"]["mean"] == 0 and figures["path_share"]["mean"] == figures["cells"]["mean"] == 1


def test_frozen_clips_are_seen(clips: list[Clip], network: Classifier) -> None:
    frames = np.stack([np.repeat(clip.frames_THWC[:1], BOARD.frames, axis=0) for clip in clips])
    figures = measured(clips, network, frames)
    assert figures["frozen"] == {"mean": 1.0, "low": pytest.approx(0.93, abs=0.01), "high": 1.0}
    assert figures["path_share"]["mean"] == 0 and figures["psnr"]["mean"][0] > figures["psnr"]["mean"][1]
    assert min(figures["frechet"]["mean"]) > 0
    # Half of the videos: the tracker's quarter of the path is not the share of frozen ones.
    frames[::2] = np.stack([clip.frames_THWC for clip in clips])[::2]
    assert measured(clips, network, frames)["frozen"]["mean"] == 0.5


def test_a_lost_object_is_not_frozen(clips: list[Clip], network: Classifier) -> None:
    frames = np.stack([np.repeat(clip.background_HWC[None], BOARD.frames, axis=0) for clip in clips])
    figures = measured(clips, network, frames)
    assert figures["frozen"]["mean"] == 0 and figures["lost"]["mean"] == figures["failed"]["mean"] == 1
    # Nor does it pass for one that moves, where flicker draws the tracker from cell to cell.
    flicker = np.random.default_rng(0).integers(-12, 13, frames.shape)
    figures = measured(clips, network, np.clip(frames + flicker, 0, 255).astype(np.uint8))
    assert figures["path_share"]["mean"] > 0.5 and figures["lost"]["mean"] == figures["failed"]["mean"] == 1


def test_chance_is_what_other_laws_give(clips: list[Clip]) -> None:
    """Against drawing laws at random, from the same pictures."""
    rng = np.random.default_rng(0)
    hits = []
    for clip in clips:
        for _ in range(30):
            other = make_clip(BOARD, "in", 1, f"{rng.integers(1 << 30)}")
            if other.path_T2[0].tolist() == clip.path_T2[0].tolist():
                hits.append((true_steps(other) == true_steps(clip)).mean())
    assert chance(clips, BOARD) == pytest.approx(np.mean(hits), abs=0.08)


def test_the_classifier_learns_object_and_step() -> None:
    found, accuracies = train_classifier(BOARD, clips=256, steps=150, seed=0)
    assert set(accuracies) == {f"{what}_{domain}" for what in ("object", "step", "still") for domain in ("in", "out")}
    assert min(accuracies.values()) > 0.5, "of 8 objects and 9 steps"
    clips = [make_clip(BOARD, "in", 0, f"frozen-{number}") for number in range(48)]
    frozen = np.stack([np.repeat(clip.frames_THWC[:1], 2, axis=0) for clip in clips])
    features, _, steps = look(found, frozen, 0)
    assert features.shape == (48, FEATURES)
    assert np.allclose((features**2).sum(1), 1, atol=1e-2)  # less layer norm's epsilon
    assert np.mean(steps == 0) > 0.6


def report(**given: dict[str, Any]) -> dict[str, Any]:
    """A report of three checkpoints: by paradigm, the held error, frozen share, law in and out at each."""
    base = {"error": [0.5, 0.3, 0.1], "frozen": [0.1, 0.1, 0.1], "law": [0.9] * 3, "law_out": 0.8, "rises": (),
            "lost_out": 0.0, "frechet_out": 1.0}
    runs = []
    for paradigm in PARADIGMS:
        values = {**base, **given.get(paradigm, {})}
        for place, iteration in enumerate((100, 200, 300)):
            sets = {}
            for name in SETS:
                law = values["law_out"] if name == "out" else values["law"][place]
                frozen = values["frozen"][place] if name == "out" else values.get("frozen_held", 0.05)
                lost = values["lost_out"] if name == "out" else 0.0
                chunks = [0.1, 0.5] if name in values["rises"] else [0.1, 0.1]
                chunks = [values["frechet_out"] * chunk for chunk in chunks] if name == "out" else chunks
                sets[name] = {
                    "frechet": {
                        side: [scale * chunk for chunk in chunks]
                        for side, scale in (("mean", 1), ("low", 0.9), ("high", 1.1))
                    },
                    "psnr": {side: [30.0, 20.0, 20.0] for side in ("mean", "low", "high")},
                    "still": {side: [0.1, 0.1] for side in ("mean", "low", "high")},
                    **{figure: {"mean": share, "low": share - 0.04, "high": share + 0.04}
                       for figure, share in (("frozen", frozen), ("lost", lost), ("failed", frozen + lost))},
                    "law": {"mean": law, "low": law - 0.05, "high": law + 0.05},
                    "x0_error": {side: values["error"][place] for side in ("mean", "low", "high")},
                    **{figure: {"mean": 0.5, "low": 0.4, "high": 0.6}
                       for figure in ("cells", "object", "path_share")},
                }
            runs.append({"paradigm": paradigm, "seed": 1, "iteration": iteration, "sets": sets})
    floor = {"mean": [0.05, 0.05]}
    return {
        "settings": {"seeds": [1], "train_clips": 8, "layers": 1, "hidden": 8},
        "classifier": {"object_in": 0.99},
        "real": {name: {"frechet": floor, "chance": 0.15} for name in SETS},
        "runs": runs,
    }


FREEZES = {"frozen": [0.2, 0.4, 0.6]}


@pytest.mark.parametrize(("given", "verdict"), [
    ({"repeat_concat": FREEZES, "inpainting": FREEZES}, "supports FlashI2V's claim: out of domain, flashi2v loses "
     "less than repeat_concat, inpainting."),
    ({"repeat_concat": FREEZES}, "less than repeat_concat; from the others it does not differ clearly"),
    # Each pair is compared at its own error: inpainting ends at 0.4, repeat_concat is never read there.
    ({"repeat_concat": {**FREEZES, "error": [0.3, 0.2, 0.1]}, "inpainting": {"error": [0.6, 0.5, 0.4]}},
     "less than repeat_concat; from the others it does not differ clearly"),
    ({"flashi2v": FREEZES}, "speaks against FlashI2V's claim"),
    ({"flashi2v": {"frozen": [0.3, 0.3, 0.3]}, "repeat_concat": FREEZES}, "mixed: out of domain, flashi2v loses less "
     "than repeat_concat and more than inpainting"),
    ({}, "does not decide"),
    # It falls apart without freezing: the law alone shows it.
    ({"repeat_concat": {"law_out": 0.3}, "inpainting": {"law_out": 0.3}}, "supports FlashI2V's claim"),
    # It freezes less, and yet follows the law less: it falls apart.
    ({"flashi2v": {"law_out": 0.3}, "repeat_concat": FREEZES, "inpainting": FREEZES}, "mixed: out of domain, flashi2v "
     "loses less than repeat_concat, inpainting and more than repeat_concat, inpainting"),
    # Who loses every object freezes none: both are failures of motion, and the law is at its floor for both.
    ({"flashi2v": {"frozen": [0.4] * 3, "law_out": 0.1},
      **dict.fromkeys(("repeat_concat", "inpainting"), {"frozen": [0.0] * 3, "lost_out": 0.9, "law_out": 0.1})},
     "supports FlashI2V's claim: out of domain, flashi2v loses less than repeat_concat, inpainting."),
    # Neither freezes, loses nor breaks the law, but the distance tells them apart.
    (dict.fromkeys(("repeat_concat", "inpainting"), {"frechet_out": 3.0}), "supports FlashI2V's claim"),
    ({"flashi2v": {"frechet_out": 3.0}}, "speaks against FlashI2V's claim"),
    # What freezes as often in domain has no gap between the domains: it is bad, but does not leak.
    (dict.fromkeys(("repeat_concat", "inpainting"), {**FREEZES, "frozen_held": 0.6}), "does not decide"),
    # Better from its first checkpoint on: not to be read at the others' error.
    ({"repeat_concat": {**FREEZES, "error": [0.09, 0.05, 0.01]}}, "does not decide"),
    ({"flashi2v": {"error": [0.09, 0.05, 0.01]}, "repeat_concat": FREEZES}, "no two paradigms were measured at equal"),
    ({"flashi2v": {"law": [0.2] * 3}, "repeat_concat": FREEZES}, "says nothing: flashi2v cannot be judged"),
    (dict.fromkeys(("repeat_concat", "inpainting"), {"law": [0.2] * 3}),
     "says nothing: no other paradigm can be judged"),
])  # fmt: skip
def test_the_verdict_follows_the_numbers(given: dict[str, Any], verdict: str) -> None:
    text = " ".join(conclude(report(**given)))
    assert verdict in text
    assert text.count("FlashI2V's claim") + text.count("This is mixed") == 1


def test_the_sentences_name_what_shows() -> None:
    text = " ".join(conclude(report(
        flashi2v={"law": [0.25] * 3}, repeat_concat={**FREEZES, "law_out": 0.3},
        inpainting={"rises": ("trained", "held"), "lost_out": 0.7},
    )))  # fmt: skip
    assert "flashi2v is inconclusive: on held pictures of its own domain, 0.25 [0.20 0.30] of its steps" in text
    assert "repeat_concat freezes out of domain (0.60 [0.56 0.64] of the videos, 0.05 [0.01 0.09] held), loses" in text
    assert "inpainting does not clearly freeze" in text and "loses the object there (0.70 [0.66 0.74] of" in text
    assert text.count("loses the object") == 1
    assert "repeat_concat freezes" in text and "flashi2v freezes" not in text
    assert "rises along the video on trained pictures and on held ones." in text
    assert "rises along the video nowhere." in text


def test_quality_is_matched() -> None:
    """At the least error that all reach, between checkpoints; a paradigm that is ahead is read earlier."""
    given = report(flashi2v={"error": [0.9, 0.6, 0.4], "frozen": [0.1, 0.2, 0.3]},
                   repeat_concat={"error": [0.5, 0.3, 0.1], "frozen": [0.2, 0.4, 0.6]})  # fmt: skip
    level, found = matched(given, ("flashi2v", "repeat_concat"), "frozen")
    assert level == 0.4 and found["flashi2v"]["mean"] == pytest.approx(0.25)  # less the 0.05 held
    assert found["repeat_concat"]["mean"] == pytest.approx(0.25)  # half way from 0.5 to 0.3
    half = 0.04 * 2**0.5  # two of 0.04 in quadrature
    assert found["flashi2v"]["high"] - found["flashi2v"]["mean"] == pytest.approx(half)
    # What has become worse since, by over-fitting, does not count.
    overfit = report(flashi2v={"error": [0.9, 0.4, 0.5], "frozen": [0.1, 0.2, 0.9]})
    assert matched(overfit, ("flashi2v", "inpainting"), "frozen")[1]["flashi2v"]["mean"] == pytest.approx(0.15)
    # A checkpoint that did not follow the law in domain yet is not read, nor is anything between it and the next.
    late = report(repeat_concat={"law": [0.2, 0.9, 0.9]}, flashi2v={"error": [0.9, 0.6, 0.4]})
    assert "repeat_concat" not in matched(late, ("flashi2v", "repeat_concat"), "frozen")[1]


def test_seeds_are_put_together() -> None:
    given = report()
    other = json.loads(json.dumps(given["runs"]))
    for row in other:
        row["seed"] = 2
        row["sets"]["held"]["law"] = {"mean": 0.5, "low": 0.2, "high": 0.8}
    given["runs"] += other
    given["settings"]["seeds"] = [1, 2]
    text = " ".join(conclude(given))
    assert "0.70 [0.20 0.95]" in text and "is inconclusive" in text, "the weaker seed decides"


def test_the_page(tmp_path: Path) -> None:
    given = report(repeat_concat={**FREEZES}, flashi2v={"law": [0.2] * 3})
    frames = np.zeros((2, 5, 8, 8, 3), np.uint8)
    write_page(tmp_path, given, strips=[{"set": "out", "label": "<true>", "frames": frames}])
    page = (tmp_path / "report.html").read_text()
    assert "flashi2v: inconclusive" in page and "&lt;true&gt;" in page and "<true>" not in page
    assert page.count("<td>out of domain</td>") == 4 and "0.60 [0.56 0.64]" in page
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["conclusions"] == conclude(given) and saved["runs"] == given["runs"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


