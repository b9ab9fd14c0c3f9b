"""`loratune plan`."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.say import say
from loratune.errors import UserError

if TYPE_CHECKING:
    from loratune.planning.plan import Plan


def plan(
    recipe: Path,
    /,
    *overrides: str,
    device: str | None = None,
    run: bool = False,
    steps_per_second: float | None = None,
    json: bool = False,
) -> None:
    """Estimate what a recipe needs before it starts: parameters, memory by part, steps, images, time.

    Nothing is trained and no weight is read: one step is followed through shapes alone.

    Args:
        recipe: what to plan; its keys can be overridden, as in --data.batch_size 2; --allow-code lets it
            name classes of your own.
        device: cpu, gpu, or a GPU's memory such as 24GB (10^9) or 23.5GiB (2^30), into which the run should fit.
        run: also encode the images and measure real steps in each bucket here.
        steps_per_second: of this recipe, where you know it; for the expected time.
        json: print JSON.
    """
    if steps_per_second is not None and steps_per_second <= 0:
        raise UserError(f"--steps-per-second is {steps_per_second}; give a number above 0")
    import torch

    from loratune.planning.calibrate import matrix_rate, true_steps
    from loratune.planning.plan import advise, make_plan, parse_memory

    room = None if device in (None, "cpu", "gpu") else parse_memory(str(device))
    gpu = torch.cuda.is_available() if device is None else device != "cpu"
    needs = make_plan(recipe, gpu, overrides, steps_per_second)
    if room is None and gpu == torch.cuda.is_available():
        rate = matrix_rate("cuda" if gpu else "cpu", needs.precision)
        needs = replace(needs, least=needs.steps * needs.flops / rate)
    if run:
        measured = true_steps(recipe, overrides)
        seconds = needs.seconds or needs.steps * measured["seconds_per_step"]
        needs = replace(needs, measured=measured, seconds=seconds)
    fits = None if room is None else needs.peak <= room
    advice = advise(recipe, gpu, room, overrides) if room is not None and not fits else None
    if json:
        facts = asdict(needs) | {"training": needs.training, "peak": needs.peak, "fits": fits}
        say(jsons.dumps(facts | {"changes": advice[0] if advice else []}, indent=2))
        return
    say("\n".join([*lines_of(needs), *(() if room is None else _verdict(needs, room, advice))]))


def lines_of(plan: Plan) -> Iterator[str]:
    """A plan for people."""
    from loratune.planning.plan import size_text

    sizes = ", ".join(f"{width}x{height}" for height, width in plan.sizes)
    parts = ", ".join(f"{name} {size_text(count)}" for name, count in plan.memory.items())
    yield f"{plan.recipe} on a {plan.device}:"
    yield f"  parameters   {plan.trained:,} trained, {plan.frozen:,} frozen"
    yield f"  images       {plan.images:,} of {sizes}; {plan.batch} a step"
    yield f"  steps        {plan.steps:,}, which see {plan.steps * plan.batch:,} images"
    yield f"  training     {size_text(plan.training)}: {parts}"
    yield f"  encoding     {size_text(plan.encoding) if plan.cache else 'nothing is cached'}"
    yield f"  sampling     {size_text(plan.sampling) if plan.sampling else 'no samples'}"
    yield f"  cache        {size_text(plan.cache)} on disk"
    yield f"  arithmetic   {plan.flops / 1e12:.3g} TFLOP a step"
    yield f"  time         {_time(plan)}"
    if plan.measured:
        shapes = ", ".join(f"{shape}: {seconds:.2f} s" for shape, seconds in plan.measured["steps"].items())
        yield f"  measured     one step of each bucket: {shapes}; peak {size_text(plan.measured['peak'])}"


def _time(plan: Plan) -> str:
    if plan.seconds:
        return duration(plan.seconds)
    if plan.least:
        return f"at least {duration(plan.least)}, by how fast this device multiplies matrices; --run measures"
    return "unknown; give --steps-per-second, or --run to measure"


def duration(seconds: float) -> str:
    """Seconds for people."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _verdict(plan: Plan, room: int, advice: tuple[list[str], Plan] | None) -> Iterator[str]:
    """Whether a run fits into so many bytes, and what would make it fit."""
    from loratune.planning.plan import size_text

    if plan.peak <= room:
        yield f"It fits: {size_text(plan.peak)} of {size_text(room)}."
        return
    yield f"It does not fit: {size_text(plan.peak)}, and there are {size_text(room)}."
    if advice is None:
        yield "No change that is known here makes it fit; take a smaller data.resolution or another device."
        return
    yield f"With these changes it takes {size_text(advice[1].peak)}:"
    yield from (f"  {change}" for change in advice[0])
