"""`loratune merge`."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratune.cli.say import say


def merge(
    base: str,
    lora: list[str],
    out: Path,
    exact: bool = False,
    allow_partial: bool = False,
    in_place: bool = False,
    unmerge: bool = False,
    json: bool = False,
) -> None:
    """Merge LoRAs into a checkpoint: W' = W_0 + scale (alpha / r) B A, rounded once; the rest stays byte for byte.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, FILE:SCALE, or FILE:SCALE,down=1,mid=0.5,up.3=0,te=0.2 with a factor for each block (the
            longest matching name counts); repeat it to add several.
        out: a .safetensors file (U-Net, text encoders and VAE in one), or a folder in diffusers' layout.
        exact: compute in float64 instead of float32.
        allow_partial: leave out what is not read of a LoRA (norms, tokens, unknown keys) and the layers that the base
            lacks or has in another shape, and name each, instead of refusing the LoRA.
        in_place: allow --out to be the base itself; it is replaced once the new one is complete.
        unmerge: subtract the LoRAs, and say how far rounding leaves the result from the original base.
        json: print what was done as JSON.
    """
    from loratune.families.base import Base
    from loratune.lora.merge.request import Request, parse
    from loratune.lora.merge.run import merge as run

    loras = [parse(text) for text in lora]
    report = run(Request(Base.open(base), loras, out, exact, allow_partial, in_place, unmerge))
    say(jsons.dumps(report, indent=2) if json else "\n".join(lines_of(report)))


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """What was merged, for people: the blocks, each LoRA, what rounding leaves, and the output."""
    if report["blocks"]:
        yield from _table(report)
    for lora in report["loras"]:
        left = f", {len(lora['unmatched'])} left out" if lora["unmatched"] else ""
        yield f"{lora['file']}: {lora['matched']} of {lora['layers']} layers matched{left}"
        yield from (f"  left out: {name}, which the base lacks or has in another shape" for name in lora["unmatched"])
        yield from (f"  left out: {key!r}, which {reason}" for key, reason in lora["left out"].items())
    if report["unmerge"]:
        most, mean = report["differ at most"], report["differ expected"]
        share = _share(report["may differ"], report)
        size = f"by {most:.2e} of ||W|| at most, and about {mean:.2e}"
        yield f"{share} of the elements may differ from the original by rounding: {size}"
    count = len(report["loras"])
    change = "taken out of" if report["unmerge"] else "changed by"
    size = f"{report['layers']} layers ({report['tensors']} tensors)"
    yield f"{report['out']}: {size} {change} {count} LoRA{'s' if count > 1 else ''}"


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each block, in columns."""
    lines = [("block", "layers", "||dW||/||W||", "rounded away")]
    for block, tally in [*report["blocks"].items(), ("all", report)]:
        lines.append((block, str(tally["layers"]), f"{tally['change']:.4f}", _share(tally["unchanged"], tally)))
    first, *others = (max(len(cell) for cell in column) for column in zip(*lines, strict=True))
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))
        yield "  ".join((line[0].ljust(first), *cells))


def _share(part: int, tally: Mapping[str, Any]) -> str:
    return f"{100 * part / max(1, tally['elements']):.2f} %"
