"""`loratune cache`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loratune.cli.say import say
from loratune.errors import UserError


def cache(recipe: Path, /, *overrides: str) -> None:
    """Encode a recipe's images and captions into the cache and stop; what is cached already is kept.

    Args:
        recipe: whose images; its keys can be overridden, as in --data.num_workers 4; --allow-code lets it
            name classes of your own.
    """
    from loratune.planning.plan import size_text
    from loratune.recipe.run import run

    cli = run(["-c", str(recipe), *overrides], execute=False)
    images, model = cli.datamodule, cli.model
    if getattr(model, "batch_kind", "") != "latents" or not images.cache_latents:
        raise UserError(f"{recipe}: nothing of it is cached: its images are used as pixels in each step")
    started = time.perf_counter()
    if not _encode(cli):
        return
    seconds, count = time.perf_counter() - started, len(images.collection)
    new, unreadable = images.encoded, len(images.unreadable)
    speed = f", {new / seconds:.1f} images/s" if new else ""
    kept = count - new - unreadable
    say(f"{count} images: {new} encoded now, {kept} were there, {unreadable} unreadable; {seconds:.1f} s{speed}")
    size = sum(file.stat().st_size for file in images.cache_dir.expanduser().rglob("*.safetensors"))
    say(f"{images.cache_dir} holds {size_text(size)}, of all runs together")


def _encode(cli: Any) -> bool:
    """Fill the cache with what a recipe's data module reads; returns whether this process is the first."""
    trainer = cli.trainer
    trainer.strategy.connect(cli.model)
    trainer.strategy.setup_environment()
    cli.datamodule.trainer = trainer
    cli.datamodule.setup("fit")
    return bool(trainer.is_global_zero)
