"""What `loratune merge` tells: how far it is, and what it did."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from loratune.families.blocks import block_of, order_of
from loratune.lora.merge.request import Request

if TYPE_CHECKING:
    from loratune.lora.merge.arithmetic import Tally
    from loratune.lora.merge.match import Matches, Weighted


def report_of(
    asked: Request,
    loras: Sequence[Weighted],
    found: Matches,
    tallies: Mapping[str, Tally],
    tensors: int,
) -> dict[str, Any]:
    """What merging did, as JSON has it."""
    from loratune.lora.merge.arithmetic import Tally

    blocks: dict[str, Tally] = {}
    for name, tally in tallies.items():
        blocks[block_of(name)] = blocks.get(block_of(name), Tally()) + tally
    whole = sum(tallies.values(), Tally())
    report: dict[str, Any] = {
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
                "left out": one.file.left_out,
            }
            for one, lacking in zip(loras, found.unmatched, strict=True)
        ],
        "exact": asked.exact,
        "unmerge": asked.unmerge,
        "layers": len(tallies),
        "tensors": tensors,
        **_tally(whole, asked.unmerge),
        "blocks": {block: _tally(blocks[block], asked.unmerge) for block in sorted(blocks, key=order_of)},
    }
    return report


def _tally(tally: Tally, unmerge: bool) -> dict[str, Any]:
    numbers = {
        "layers": tally.layers,
        "change": tally.ratio,
        "elements": tally.elements,
        "unchanged": tally.unchanged,
    }
    if unmerge:
        base = tally.base or 1.0
        numbers["may differ"] = tally.doubtful
        numbers["differ at most"] = (tally.bound / base) ** 0.5
        numbers["differ expected"] = (tally.expected / base) ** 0.5
    return numbers


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
