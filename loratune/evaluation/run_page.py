"""The run's page, from what the run left in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from loratune.evaluation.curves import Series, bars, chart, number, smooth
from loratune.evaluation.figures import FOLDER
from loratune.evaluation.page import Card, Page, Shown, render
from loratune.evaluation.strips import FIGURES
from loratune.families.blocks import order_of
from loratune.formats.atomic import atomic_path, tolerated
from loratune.runs.folder import RECIPE, REPORT
from loratune.runs.history import FILE, Curves, curves, notes, read

SETS = {"held_out": "held-out images", "training": "training images"}
MOST_GRIDS = 4
NOISY = 12  # points, from which on a line is smoothed


def write_page(trainer: L.Trainer) -> None:
    """Write report.html into the run's folder, whole or not at all; where it cannot be written the run goes on."""
    folder = Path(trainer.default_root_dir)
    with tolerated(folder / REPORT), atomic_path(folder / REPORT) as path:
        path.write_text(render(page_of(folder, trainer.global_step, trainer.max_steps, _told(trainer))), "utf-8")


def _told(trainer: L.Trainer) -> list[tuple[str, str]]:
    module: Any = trainer.lightning_module
    data: Any = getattr(trainer, "datamodule", None)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    facts = [("base", Path(str(getattr(module, "base_name", ""))).name), ("trained parameters", f"{trained:,}")]
    for name, rows in (("training images", "training"), ("held out", "held_out")):
        if (samples := getattr(data, rows, None)) is not None:
            facts.append((name, f"{len(samples):,}"))
    return [(name, value) for name, value in facts if value]


def page_of(folder: Path, step: int, steps: int, facts: Sequence[tuple[str, str]] = ()) -> Page:
    """A run's page.

    Args:
        folder: of the run; its history, recipe and figures are read.
        step: that it has reached.
        steps: that it is to do; -1 is not known.
        facts: names and numbers beside those in the history.
    """
    records = read(folder / FILE)
    lines = curves(records)
    of = f" of {steps:,}" if steps > 0 else ""
    recipe = folder / RECIPE
    return Page(
        title=folder.resolve().name,
        subtitle=f"a run of loratune, at step {step:,}{of}",
        facts=[*facts, *_facts(lines)],
        warnings=[f"Step {at}: {text}" for at, text in notes(records)],
        cards=_cards(lines),
        head=("fixed images", "loss, base", "loss, adapted", "gap", "standard error", "smallest gap"),
        rows=_rows(lines),
        shown=_shown(folder / FOLDER, step),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def _facts(lines: Curves) -> list[tuple[str, str]]:
    facts = []
    if train := lines.get("train/loss"):
        last = train[-min(20, len(train)) :]
        facts.append(("training loss, recent mean", number(sum(value for _, value in last) / len(last))))
    if gap := lines.get("held_out/gap"):
        error = dict(lines.get("held_out/gap_se", [])).get(gap[-1][0])
        facts.append(("held-out gap", number(gap[-1][1]) + (f" ± {number(error)}" if error else "")))
    if "drift" in lines:
        facts.append(("drift", number(lines["drift"][-1][1])))
    if speed := lines.get("train/steps_per_second"):
        facts.append(("steps/s", number(sorted(value for _, value in speed)[len(speed) // 2])))
    return facts


def _cards(lines: Curves) -> list[Card]:
    used: set[str] = set()

    def picked(pattern: str) -> list[tuple[str, list[tuple[int, float]]]]:
        matching = [(name, lines[name]) for name in lines if re.fullmatch(pattern, name)]
        used.update(name for name, _ in matching)
        return matching

    losses = [
        Series("each", points, faint=True, colour=0) for _, points in picked("train/loss") if len(points) >= NOISY
    ]
    losses += [series for name, points in picked("train/loss") for series in _noisy("training", points)]
    losses += [Series("held out", points) for _, points in picked("val/loss")]
    ranges = [
        series for name, points in picked(r"train/loss_t\d.*") for series in _noisy(name.partition("_")[2], points)
    ]
    picked(r".*/gap_se|(held_out|training|neutral)/loss")
    levels = [Series(f"t = {name.rpartition('_t')[2]}", points) for name, points in picked(r"held_out/gap_t\d+")]
    drift = [Series("neutral prompts", points) for _, points in picked("drift")]
    norms = sorted(
        ((name[5:], points[-1][1]) for name, points in picked("norm/.*")), key=lambda series: order_of(series[0])
    )
    rates = [Series(name.removeprefix("train/"), points) for name, points in picked(r"(train/)?lr.*")]
    gradient = [Series("each", points, faint=True, colour=0) for _, points in picked("train/grad_norm")]
    gradient += [series for _, points in picked("train/grad_norm") for series in _noisy("before clipping", points)]
    gaps = _gaps(lines)
    picked(r".*/gap")
    cards = [
        Card("Loss", chart(losses), "Of the training batches, smoothed, and of all held-out images."),
        Card(
            "Gap: loss with the LoRA less loss of the base",
            chart(gaps, zero=True),
            "Same images, t and noise through both. Below 0 the LoRA is better; bands are one standard error.",
        ),
        Card(
            "Drift",
            chart(drift, zero=True),
            "Relative squared difference of the output from the base's, on neutral prompts at fixed noise.",
        ),
        Card("Training loss by range of t", chart(ranges, log=True), "Small t is nearly the image, large t noise."),
        Card("Held-out gap by t", chart(levels, zero=True)),
        Card("Norm of B A by block", bars(norms), "Frobenius' norm, scaled as it is added to the weights."),
        Card("Learning rate", chart(rates)),
        Card("Norm of the gradient", chart(gradient, log=True)),
    ]
    rest = [name for name in sorted(lines) if name not in used and name not in ("epoch", "train/steps_per_second")]
    rest = [name for name in rest if any(value for _, value in lines[name])]  # such as the number of skipped steps
    return [*cards, *(Card(name, chart(_noisy(name, lines[name]))) for name in rest)]


def _noisy(name: str, points: list[tuple[int, float]]) -> list[Series]:
    """A line, smoothed where it has points enough."""
    if len(points) < NOISY:
        return [Series(name, points)]
    return [Series(name, smooth(points, max(5, len(points) // 12)))]


def _gaps(lines: Curves) -> list[Series]:
    series = []
    for colour, (key, name) in enumerate(SETS.items()):
        points, errors = lines.get(f"{key}/gap", []), dict(lines.get(f"{key}/gap_se", []))
        series.append(Series(name, points, [errors.get(step, 0.0) for step, _ in points], colour=colour))
    return series


def _rows(lines: Curves) -> list[list[str]]:
    rows = []
    for key, name in SETS.items():
        gaps, losses = lines.get(f"{key}/gap"), dict(lines.get(f"{key}/loss", []))
        if not gaps or gaps[-1][0] not in losses:
            continue
        step, gap = gaps[-1]
        loss, error = losses[step], dict(lines.get(f"{key}/gap_se", [])).get(step)
        best = min(gaps, key=lambda point: point[1])
        numbers = [number(loss - gap), number(loss), number(gap), "" if error is None else number(error)]
        rows.append([name, *numbers, f"{number(best[1])} at step {best[0]:,}"])
    return rows


def _shown(folder: Path, step: int) -> list[Shown]:
    """Sample grids, the latest first, and the figures that there are."""
    named = {int(match[1]): path for path in folder.glob("*.png") if (match := re.search(r"samples-(\d+)", path.name))}
    steps = sorted(at for at in named if at <= step)
    kept = {steps[at * (len(steps) - 1) // max(1, MOST_GRIDS - 1)] for at in range(MOST_GRIDS)} if steps else set()
    note = "The same prompts from the same noise."
    images = [(f"Samples at step {at:,}", named[at], note) for at in sorted(kept, reverse=True)]
    images += [(title, folder / f"{name}.png", note) for name, (title, note) in FIGURES.items()]
    shown = []
    for title, path, note in images:
        if path.is_file():
            with Image.open(path) as image:
                shown.append(Shown(title, image.convert("RGB"), note))
    return shown
