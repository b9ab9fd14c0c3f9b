"""`loratune data`."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.say import say

if TYPE_CHECKING:
    from loratune.data.audit import Audit, Finding

NAMED = 10


def data(recipe: Path, /, *overrides: str, json: Path | None = None) -> int:
    """Check a recipe's images before training: counts, sizes, captions, and each fault by name.

    Nothing is encoded, and nothing but the --json FILE is written. The exit code is 1 where something should be mended.

    Args:
        recipe: whose images; its keys can be overridden, as in --data.resolution 512; --allow-code lets it
            name classes of your own.
        json: a file for the whole report, with every name.
    """
    from rich.progress import track

    from loratune.data.audit import audit
    from loratune.families.prompts import Prompts
    from loratune.formats.atomic import atomic_path
    from loratune.lora.tokens import WINDOW
    from loratune.planning.plan import build
    from loratune.training.captions import counter

    cli = build(recipe, overrides)
    images = cli.datamodule
    prompts, token = getattr(cli.model, "prompts", None) or Prompts(), getattr(cli.model, "tokens", None)
    report = audit(
        images.collection,
        images.batch_size * cli.trainer.world_size,
        counter(prompts, token),
        WINDOW * prompts.chunks,
        images.num_workers,
        lambda looks: track(looks, total=len(images.collection), description="looking", transient=True),
    )
    say("\n".join(lines_of(str(recipe), report)))
    if json is not None:
        with atomic_path(json) as path:
            path.write_text(jsons.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    return int(bool(report.findings))


def as_json(report: Audit) -> dict[str, Any]:
    """An audit with every name."""
    buckets = {f"{width}x{height}": count for (width, height), count in report.buckets.items()}
    return asdict(report) | {"buckets": buckets}


def lines_of(recipe: str, report: Audit) -> Iterator[str]:
    """An audit for people."""
    yield f"{recipe}:"
    for source in report.sources:
        held_out = f"{source.held_out} held out" if source.held_out else "none held out"
        yield f"  {source.path} ({source.role}): {source.images} images, {held_out}, {source.drawn} of an epoch"
    yield f"  an epoch: {sum(source.drawn for source in report.sources)} images in {report.batches} batches"
    sizes = sorted(report.buckets.items(), key=lambda pair: (-pair[1], pair[0]))
    yield "  sizes: " + ", ".join(f"{width}x{height}: {count}" for (width, height), count in sizes)
    if report.tags:
        yield "  tags: " + ", ".join(f"{tag} ({count})" for tag, count in report.tags.items())
    for finding in report.findings:
        yield ""
        yield from _lines_of(finding)
    yield ""
    faults = ", ".join(finding.message for finding in report.findings)
    yield f"To mend: {faults}." if faults else "Nothing to mend."


def _lines_of(finding: Finding) -> Iterator[str]:
    yield f"{len(finding.names)} {finding.message}; {finding.mend}:"
    yield from (f"  {name}" for name in finding.names[:NAMED])
    if len(finding.names) > NAMED:
        yield f"  and {len(finding.names) - NAMED} more (--json FILE has all)"
