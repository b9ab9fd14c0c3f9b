"""A recipe's images before they are trained on: `loratune data` and `loratune cache`."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track

from loratune.data.audit import Audit, Finding, audit
from loratune.data.module import CaptionedImages
from loratune.errors import UserError
from loratune.families.prompts import Prompts
from loratune.formats.atomic import atomic_path
from loratune.lora.tokens import WINDOW
from loratune.planning.plan import build, size_text
from loratune.recipe.parse import run as run_recipe
from loratune.training.captions import counter

NAMED = 10


def data(recipe: Path, json: Path | None, words: Sequence[str] = ()) -> bool:
    """Print what is to be known of a recipe's images; returns whether something should be mended."""
    cli = build(recipe, words)
    images: CaptionedImages = cli.datamodule
    prompts, token = getattr(cli.model, "prompts", None) or Prompts(), getattr(cli.model, "tokens", None)
    found = audit(
        images.collection,
        images.batch_size * cli.trainer.world_size,
        counter(prompts, token),
        WINDOW * prompts.chunks,
        images.num_workers,
        lambda looks: track(looks, total=len(images.collection), description="looking", transient=True),
    )
    print("\n".join(lines_of(str(recipe), found)))
    if json is not None:
        with atomic_path(json) as path:
            path.write_text(json_format.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    return bool(found.findings)


def as_json(found: Audit) -> dict[str, Any]:
    """An audit with every name."""
    buckets = {f"{width}x{height}": count for (width, height), count in found.buckets.items()}
    return asdict(found) | {"buckets": buckets}


def lines_of(recipe: str, found: Audit) -> list[str]:
    """An audit for a person."""
    lines = [f"{recipe}:"]
    for one in found.sources:
        held = f"{one.held_out} held out" if one.held_out else "none held out"
        lines.append(f"  {one.path} ({one.role}): {one.images} images, {held}, {one.drawn} of an epoch")
    lines.append(f"  an epoch: {sum(one.drawn for one in found.sources)} images in {found.batches} batches")
    sizes = sorted(found.buckets.items(), key=lambda pair: (-pair[1], pair[0]))
    lines.append("  sizes: " + ", ".join(f"{width}x{height}: {count}" for (width, height), count in sizes))
    if found.tags:
        lines.append("  tags: " + ", ".join(f"{tag} ({count})" for tag, count in found.tags.items()))
    for fault in found.findings:
        lines += ["", *_finding(fault)]
    told = (
        "Nothing to mend."
        if not found.findings
        else "To mend: " + ", ".join(one.message for one in found.findings) + "."
    )
    return [*lines, "", told]


def _finding(one: Finding) -> list[str]:
    more = [f"  and {len(one.names) - NAMED} more (--json FILE has all)"] if len(one.names) > NAMED else []
    return [f"{len(one.names)} {one.message}; {one.mend}:", *(f"  {name}" for name in one.names[:NAMED]), *more]


def cache(recipe: Path, words: Sequence[str] = ()) -> None:
    """Encode a recipe's images and captions into the cache, and stop."""
    cli = run_recipe(["-c", str(recipe), *words], execute=False)
    images: CaptionedImages = cli.datamodule
    model: Any = cli.model
    if getattr(model, "batch_kind", "") != "latents" or not images.cache_latents:
        raise UserError(f"{recipe}: nothing of it is cached: its images are used as pixels in each step")
    started, trainer = time.perf_counter(), cli.trainer
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    images.trainer = trainer
    images.setup("fit")
    if not trainer.is_global_zero:
        return
    seconds, every = time.perf_counter() - started, len(images.collection)
    size = sum(file.stat().st_size for file in images.cache_dir.expanduser().rglob("*.safetensors"))
    new = images.encoded
    speed = f", {new / seconds:.1f} images/s" if new else ""
    print(f"{every} images: {new} encoded now, {every - new - len(images.unreadable)} were there, ", end="")
    print(f"{len(images.unreadable)} unreadable; {seconds:.1f} s{speed}")
    print(f"{images.cache_dir} holds {size_text(size)}, of all runs together")
