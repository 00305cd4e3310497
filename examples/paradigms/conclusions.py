"""The paragraph of conclusions, made from the figures by rules, whatever they say.

A difference is told only where 95% intervals do not overlap. A paradigm that does not follow the law in domain is
inconclusive: what does not move by rule there proves nothing elsewhere. FlashI2V's claim is about the gap between the
domains, so that the verdict compares gaps: those of flashi2v and of each other paradigm, at an error in domain that
both reach with checkpoints that follow the law there. Motion can fail in two ways, by freezing and by losing the
object; both count as one, as who loses all objects freezes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TIMES_CHANCE = 2.0
"""Law-following in domain is clear where its lower bound is this many times chance."""
OURS = "flashi2v"
JUDGED = {
    "failed": ("videos frozen or without their object", 1), "frozen": ("frozen videos", 1),
    "law": ("steps by the law", -1), "frechet": ("Fréchet distance", 1),
}  # fmt: skip
"""Figures that the verdict compares, where they were measured: their names, and whether more is worse."""

Figure = Mapping[str, Any]


def runs_of(report: Mapping[str, Any], paradigm: str) -> list[Mapping[str, Any]]:
    """A paradigm's rows, in the order of seed and iteration."""
    rows = [row for row in report["runs"] if row["paradigm"] == paradigm]
    return sorted(rows, key=lambda row: (row["seed"], row["iteration"]))


def paradigms_of(report: Mapping[str, Any]) -> list[str]:
    """In the order of the report."""
    return list(dict.fromkeys(row["paradigm"] for row in report["runs"]))


def over_seeds(rows: Sequence[Mapping[str, Any]], name: str, figure: str) -> dict[str, Any] | None:
    """A figure of one set over seeds: the mean, and the widest of their intervals; None where it was not measured."""
    found = [row["sets"][name][figure] for row in rows if figure in row["sets"][name]]
    if not found:
        return None
    sides = {"mean": np.mean, "low": np.min, "high": np.max}
    return {side: fold([one[side] for one in found], axis=0).tolist() for side, fold in sides.items()}


def at_end(report: Mapping[str, Any], paradigm: str, name: str, figure: str) -> dict[str, Any] | None:
    """:func:`over_seeds` at the last iteration."""
    return over_seeds(_at(runs_of(report, paradigm), _iterations(report)[-1]), name, figure)


def along_training(report: Mapping[str, Any], paradigm: str, figure: str, *, gap: bool = False) -> list[dict[str, Any]]:
    """At each iteration: the error in domain, whether the law is followed there, and a figure with its interval.

    Args:
        report: of the page.
        paradigm: whose training.
        figure: its name.
        gap: out of domain less held, instead of out of domain alone.
    """
    points = []
    for iteration in _iterations(report):
        rows = _at(runs_of(report, paradigm), iteration)
        found, held = (_over_chunks(over_seeds(rows, name, figure)) for name in ("out", "held"))
        if found is None or held is None:
            continue
        points.append({
            "iteration": iteration, "error": in_domain_error(rows),
            "follows": _rows_follow_law(report, rows) is not False, **(_difference(found, held) if gap else found),
        })  # fmt: skip
    return points


def in_domain_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """On held pictures: of one step from pure noise; where it was not measured, the mean Frechet distance."""
    error = over_seeds(rows, "held", "x0_error")
    return float(error["mean"] if error is not None else np.mean(_needed(over_seeds(rows, "held", "frechet"))["mean"]))


def follows_law(report: Mapping[str, Any], paradigm: str) -> bool | None:
    """Whether held law-following at the end is clearly above chance for every seed; None where it was not measured."""
    return _rows_follow_law(report, _at(runs_of(report, paradigm), _iterations(report)[-1]))


def matched(report: Mapping[str, Any], paradigms: Sequence[str], figure: str) -> tuple[float, dict[str, Figure]]:
    """A figure's gap, out of domain less held, where paradigms have the same error in domain.

    That error is the least that all of them reach; between checkpoints, all is interpolated along the error. A
    paradigm's best checkpoint so far stands for a later one that is worse. A paradigm is left out whose first
    checkpoint, of those that follow the law in domain, is better already: it cannot be read at that error.
    """
    curves = {
        paradigm: _improving([
            point for point in along_training(report, paradigm, figure, gap=True) if point["follows"]
        ])
        for paradigm in paradigms
    }  # fmt: skip
    level = max(curve[-1]["error"] for curve in curves.values())
    found = {}
    for paradigm, curve in curves.items():
        if curve[0]["error"] < level:
            continue
        errors = [point["error"] for point in reversed(curve)]
        found[paradigm] = {
            side: float(np.interp(level, errors, [point[side] for point in reversed(curve)]))
            for side in ("mean", "low", "high")
        }
    return level, found


def conclude(report: Mapping[str, Any]) -> list[str]:
    """The sentences."""
    paradigms = paradigms_of(report)
    judged = [paradigm for paradigm in paradigms if follows_law(report, paradigm) is not False]
    sentences = [*_gate(report, paradigms), *(_one(report, paradigm) for paradigm in judged)]
    if OURS in judged:
        sentences += [_matched_sentence(report, other) for other in judged if other != OURS]
    sentences.append(_verdict(report, judged))
    seeds, settings = len(report["settings"]["seeds"]), report["settings"]
    sentences.append(
        f"What this cannot show: one world of {settings['train_clips']} clips, models of {settings['layers']} layers "
        f"{settings['hidden']} wide, {seeds} training {'seed' if seeds == 1 else 'seeds'}; intervals are over videos, "
        "not over trainings."
        if "train_clips" in settings else
        f"What this cannot show: {seeds} training {'seed' if seeds == 1 else 'seeds'}; intervals are over videos, not "
        "over trainings."
    )
    return sentences


def _gate(report: Mapping[str, Any], paradigms: Sequence[str]) -> list[str]:
    if all(follows_law(report, paradigm) is None for paradigm in paradigms):
        return ["No classifier knows the laws of these videos, so that motion is judged by its amount alone."]
    sentences = []
    for paradigm in paradigms:
        if follows_law(report, paradigm) is False:
            law, chance = _needed(at_end(report, paradigm, "held", "law")), report["real"]["held"]["chance"]
            sentences.append(
                f"{paradigm} is inconclusive: on held pictures of its own domain, {shown(law)} of its steps follow the "
                f"law, where chance is {chance:.2f}."
            )
    return sentences


def _one(report: Mapping[str, Any], paradigm: str) -> str:
    """What shows of one paradigm at the end of training."""
    held, out = (_needed(at_end(report, paradigm, name, "frozen")) for name in ("held", "out"))
    parts = []
    if out["low"] > held["high"]:
        parts.append(f"freezes out of domain ({shown(out)} of the videos, {shown(held)} held)")
    else:
        parts.append(f"does not clearly freeze more out of domain than in it ({shown(out)}, {shown(held)} held)")
    lost = [at_end(report, paradigm, name, "lost") for name in ("held", "out")]
    if lost[0] is not None and lost[1] is not None and lost[1]["low"] > lost[0]["high"]:
        parts.append(f"loses the object there ({shown(lost[1])} of the videos, {shown(lost[0])} held)")
    laws = [at_end(report, paradigm, name, "law") for name in ("held", "out")]
    if laws[0] is not None and laws[1] is not None:
        verb = "loses the law there" if laws[1]["high"] < laws[0]["low"] else "does not clearly lose the law there"
        parts.append(f"{verb} ({shown(laws[1])} of the steps, {shown(laws[0])} held)")
    rises = {name: _rise(_needed(at_end(report, paradigm, name, "frechet"))) for name in ("trained", "held", "out")}
    names = {"trained": "on trained pictures", "held": "on held ones", "out": "out of domain"}
    rising = [names[name] for name, rise in rises.items() if rise]
    parts.append(f"its distance rises along the video {' and '.join(rising) if rising else 'nowhere'}")
    return f"{paradigm} {parts[0]}, {', '.join(parts[1:-1]) + ', ' if parts[1:-1] else ''}and {parts[-1]}."


def _matched_sentence(report: Mapping[str, Any], other: str) -> str:
    """flashi2v beside another paradigm, at an error that both reach."""
    parts, level, gaps = [], 0.0, dict[str, Figure]()
    for figure in _judged_figures(report):
        level, gaps = matched(report, (OURS, other), figure)
        if len(gaps) < 2:
            break
        parts.append(f"{JUDGED[figure][0]} {shown(gaps[OURS])} and {shown(gaps[other])}")
    if len(gaps) < 2:
        ahead = OURS if OURS not in gaps else other
        return (
            f"{OURS} and {other} cannot be compared at equal quality in domain: {ahead} is better than the other from "
            "its first checkpoint on that follows the law."
        )
    return (
        f"{OURS} and {other} at equal quality in domain (an error of {level:.3f}), out of domain less in it: "
        f"{'; '.join(parts)}."
    )


def _verdict(report: Mapping[str, Any], judged: Sequence[str]) -> str:
    """What this says about FlashI2V's claim: the gap between the domains, at an error in domain that two reach."""
    if OURS not in judged:
        return "About FlashI2V's claim this run says nothing: flashi2v cannot be judged."
    if len(judged) == 1:
        return "About FlashI2V's claim this run says nothing: no other paradigm can be judged."
    signs: dict[str, set[int]] = {}
    for other in judged:
        for figure in _judged_figures(report) if other != OURS else ():
            _, gaps = matched(report, (OURS, other), figure)
            if len(gaps) == 2:
                sign = JUDGED[figure][1] * _order(gaps[OURS], gaps[other])
                signs.setdefault(other, set()).add(sign)
    if not signs:
        return "About FlashI2V's claim this run says nothing: no two paradigms were measured at equal quality."
    less, more = ([other for other in signs if sign in signs[other]] for sign in (-1, 1))
    if less and not more:
        rest = "" if len(less) == len(signs) else "; from the others it does not differ clearly"
        return f"This supports FlashI2V's claim: out of domain, flashi2v loses less than {', '.join(less)}{rest}."
    if more and not less:
        return f"This speaks against FlashI2V's claim: out of domain, flashi2v loses more than {', '.join(more)}."
    if more:
        return (
            f"This is mixed: out of domain, flashi2v loses less than {', '.join(less)} and more than "
            f"{', '.join(more)}."
        )
    return (
        "This does not decide FlashI2V's claim: out of domain, flashi2v does not differ clearly from "
        f"{', '.join(signs)}."
    )


def _judged_figures(report: Mapping[str, Any]) -> list[str]:
    """Those of :data:`JUDGED` that were measured; frozen videos alone where no lost object is seen."""
    sets = report["runs"][0]["sets"]["held"]
    return [figure for figure in JUDGED if figure in sets and not (figure == "frozen" and "failed" in sets)]


def shown(figure: Figure) -> str:
    """A number with its interval."""
    return f"{figure['mean']:.2f} [{figure['low']:.2f} {figure['high']:.2f}]"


def _rise(frechet: Figure) -> bool:
    """Whether the last chunk's interval lies above the first's."""
    lows, highs = frechet["low"], frechet["high"]
    return len(lows) > 1 and lows[-1] > highs[0]


def _rows_follow_law(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool | None:
    law = over_seeds(rows, "held", "law")
    return None if law is None else law["low"] >= TIMES_CHANCE * report["real"]["held"]["chance"]


def _over_chunks(figure: dict[str, Any] | None) -> dict[str, Any] | None:
    """One number of a figure over chunks: their mean, within the mean of their bounds."""
    return None if figure is None else {side: float(np.mean(values)) for side, values in figure.items()}


def _difference(one: Figure, other: Figure) -> Figure:
    """Of two independent figures; half-widths add in quadrature."""
    mean = one["mean"] - other["mean"]
    return {
        "mean": mean,
        "low": mean - float(np.hypot(one["mean"] - one["low"], other["high"] - other["mean"])),
        "high": mean + float(np.hypot(one["high"] - one["mean"], other["mean"] - other["low"])),
    }


def _order(one: Figure, other: Figure) -> int:
    """-1 where ``one`` is clearly lower, 1 where it is clearly higher, else 0."""
    return -1 if one["high"] < other["low"] else 1 if one["low"] > other["high"] else 0


def _improving(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points whose error is below that of all before."""
    kept: list[dict[str, Any]] = []
    for point in points:
        if not kept or point["error"] < kept[-1]["error"]:
            kept.append(point)
    return kept


def _iterations(report: Mapping[str, Any]) -> list[int]:
    return sorted({row["iteration"] for row in report["runs"]})


def _at(rows: Sequence[Mapping[str, Any]], iteration: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["iteration"] == iteration]


def _needed(figure: dict[str, Any] | None) -> dict[str, Any]:
    assert figure is not None, "measured in every experiment"
    return figure
