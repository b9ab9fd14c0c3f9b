"""What `loratune merge` tells: how far it is, and what it did."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from loratune.lora.merge.request import Request, block_of

if TYPE_CHECKING:
    from loratune.lora.merge.match import AnyLayer, Matches, Weighted
    from loratune.lora.merge.stream import Tally


def report_of(
    asked: Request,
    loras: Sequence[Weighted[AnyLayer]],
    found: Matches[AnyLayer],
    tallies: Mapping[str, Tally],
    tensors: int,
) -> dict[str, Any]:
    """What merging did, as JSON has it."""
    from loratune.lora.merge.stream import Tally

    blocks: dict[str, Tally] = {}
    for name, tally in tallies.items():
        blocks[block_of(name)] = blocks.get(block_of(name), Tally()) + tally
    whole = sum(tallies.values(), Tally())
    told: dict[str, Any] = {
        "out": str(asked.out),
        "base": asked.base.name,
        "loras": [
            {
                "file": str(one.path),
                "weight": one.weight,
                "blocks": dict(one.given.blocks),
                "layers": len(one.file.layers),
                "matched": len(one.file.layers) - len(lacking),
                "unmatched": lacking,
            }
            for one, lacking in zip(loras, found.unmatched, strict=True)
        ],
        "exact": asked.exact,
        "unmerge": asked.unmerge,
        "layers": len(tallies),
        "tensors": tensors,
        **_tally(whole, asked.unmerge),
        "blocks": {block: _tally(blocks[block], asked.unmerge) for block in sorted(blocks, key=_order)},
    }
    return told


def _tally(tally: Tally, unmerge: bool) -> dict[str, Any]:
    told = {
        "layers": tally.layers,
        "change": tally.ratio,
        "elements": tally.elements,
        "unchanged": tally.unchanged,
    }
    if unmerge:
        base = tally.base or 1.0
        told["may differ"] = tally.doubtful
        told["differ at most"] = (tally.bound / base) ** 0.5
        told["differ expected"] = (tally.expected / base) ** 0.5
    return told


def _order(block: str) -> tuple[int, str]:
    first = block.split(".")[0]
    order = ("unet", "down", "mid", "up", "te1", "te2")
    return order.index(first) if first in order else len(order), block


def show(report: Mapping[str, Any]) -> None:
    """Print it for people."""
    if report["blocks"]:
        lines = [("block", "layers", "||dW||/||W||", "rounded away")]
        for block, tally in [*report["blocks"].items(), ("all", report)]:
            changed, unchanged = f"{tally['change']:.4f}", _share(tally["unchanged"], tally)
            lines.append((block, str(tally["layers"]), changed, unchanged))
        first, *others = (max(len(cell) for cell in column) for column in zip(*lines, strict=True))
        for line in lines:
            cells = (cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))
            print("  ".join((line[0].ljust(first), *cells)))
    for one in report["loras"]:
        left = f", {len(one['unmatched'])} not in the base" if one["unmatched"] else ""
        print(f"{one['file']}: {one['matched']} of {one['layers']} layers matched{left}")
    if report["unmerge"]:
        most, mean = report["differ at most"], report["differ expected"]
        told = f"{_share(report['may differ'], report)} of the elements may differ from the original by rounding"
        print(f"{told}: by {most:.2e} of ||W|| at most, and about {mean:.2e}")
    count = len(report["loras"])
    done = "taken out of" if report["unmerge"] else "changed by"
    verb = f"{report['layers']} layers ({report['tensors']} tensors) {done} {count} LoRA{'s' if count > 1 else ''}"
    print(f"{report['out']}: {verb}")


def _share(part: int, tally: Mapping[str, Any]) -> str:
    return f"{100 * part / max(1, tally['elements']):.2f} %"


class Bar:
    """Bytes done, shown on a terminal; counted from before there is anything to show them with."""

    def __init__(self) -> None:
        self._done = 0
        self._show: Any = None

    def advance(self, count: int) -> None:
        """Count bytes; threads may call it at once."""
        if self._show is None:
            self._done += count
        else:
            self._show(count)

    def show(self, total: int, stack: ExitStack) -> None:
        """Draw a bar on stderr, if that is a terminal, until the stack is left."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        progress = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
        task = progress.add_task("merging", total=total)
        self._show = lambda count: progress.advance(task, count)
        self._show(self._done)
