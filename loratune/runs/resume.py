"""What a run is made of, kept in its checkpoints; and whether a run that goes on is still the same run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from loratune import __version__
from loratune.errors import UserError
from loratune.families.base import base_hash
from loratune.runs.checkpoints import read_checkpoint
from loratune.runs.loggers import add_history, begin
from loratune.training.randomness import restore, seed_dropout, states

log = logging.getLogger(__name__)
KEY = "loratune"
SECTIONS = ("model", "data", "seed_everything", "trainer")
# Of the trainer's settings, those that decide what is computed; the others say how long, where to and how often.
TRAINER = (
    *("accumulate_grad_batches", "callbacks", "gradient_clip_algorithm", "gradient_clip_val"),
    *("limit_train_batches", "overfit_batches", "precision", "strategy"),
)
# Compared by what they hold, or without influence on what is computed.
FREE = ("model.base", "data.path", "data.cache_dir", "data.num_workers", "data.strict")
PLACES = ("path", "masks")
SHOWN = 3
OPTIONS = "model.optimizer.init_args."


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """A recipe as dotted keys and their values as JSON; lists are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: json.dumps(tree, sort_keys=True, default=str)}
    keys: dict[str, str] = {}
    for key, value in tree.items():
        keys |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return keys


def what_matters(recipe: str) -> dict[str, str]:
    """Of a resolved recipe (YAML), the keys that decide what is computed, and their values."""
    tree = yaml.safe_load(recipe) or {}
    kept = {name: tree[name] for name in SECTIONS if name in tree}
    if (tree.get("data") or {}).get("sources"):  # where they are matters not; what is in them is compared for itself
        sources = [
            {key: value for key, value in source.items() if key not in PLACES} for source in tree["data"]["sources"]
        ]
        kept["data"] = kept["data"] | {"sources": sources}
    kept["trainer"] = {key: value for key, value in (tree.get("trainer") or {}).items() if key in TRAINER}
    return {key: value for key, value in flat(kept).items() if key not in FREE}


def differences(old: Mapping[str, str], new: Mapping[str, str], allow: Collection[str] = ()) -> list[str]:
    """What is different, as "key: old -> new"; keys that only `new` has are of a later version's and count not.

    Args:
        old: keys and values of the checkpoint.
        new: of the run that is to go on.
        allow: keys that may differ, each with all that is below it.
    """
    changed = [key for key, value in old.items() if new.get(key, "nothing") != value and not _below(key, allow)]
    return [f"{key}: {old[key]} -> {new.get(key, 'nothing')}" for key in changed]


def _below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def refuse_differences(checkpoint: str, changed: list[str]) -> None:
    """Raise UserError in one line where there are differences."""
    if not changed:
        return
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    keys = ", ".join(line.partition(":")[0] for line in changed)
    raise UserError(
        f"{checkpoint}: is of another run: {'; '.join(changed[:SHOWN])}{more}; "
        f"undo the change, train anew in another folder, or allow it by run.allow_changed: [{keys}]"
    )


def check_recipe(path: Path, recipe: str, allow: Collection[str]) -> None:
    """See, before any weight is loaded, that a checkpoint can be gone on from with a recipe.

    Args:
        path: of the checkpoint.
        recipe: resolved, as YAML.
        allow: keys that may differ.

    Raises:
        UserError: it holds weights only, or the recipe differs.
    """
    checkpoint = {} if path.is_dir() else read_checkpoint(path)
    if checkpoint and "optimizer_states" not in checkpoint:
        raise UserError(f"{path}: holds weights alone, from which no run can go on; give a whole checkpoint")
    if saved := checkpoint.get(KEY):
        refuse_differences(str(path), differences(saved["recipe"], what_matters(recipe), allow))
    elif checkpoint:
        log.warning("%s: says nothing of its recipe, base and data; nothing was compared", path)


def manifest(data: Any) -> str:
    """How many images a data module trains on and holds out, and a hash of all it knows of each."""
    counts, digest = [], hashlib.sha256()
    for rows in (getattr(data, "training", None), getattr(data, "held_out", None)):
        entries: Any = getattr(rows, "entries", None) or ()
        counts.append(len(entries))
        for line in _lines(entries):
            digest.update(line.encode() + b"\n")
    return f"{counts[0]} images and {counts[1]} held out ({digest.hexdigest()[:16]})"


def _lines(entries: Any) -> Iterator[str]:
    yield from (repr(entry) for entry in entries)
    yield "end"


class Run(L.Callback):
    """The run's folder, and what may change on a resume.

    Args:
        overwrite: replace the run that the folder holds; its checkpoints, curves and LoRAs are deleted.
        allow_changed: keys that may differ from the checkpoint's on a resume, each with all below it, such as
            model.objective; how long, where to and how often may always differ.
    """

    def __init__(self, overwrite: bool = False, allow_changed: tuple[str, ...] = ()) -> None:
        self.overwrite, self.allow_changed = overwrite, tuple(allow_changed)
        self.recipe = ""
        self._base: Future[str] | None = None
        self._states: list[dict[str, Any]] | None = None
        self._changed: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep what is logged, and begin to hash the base: gigabytes, while the run is set up."""
        if stage == "fit":
            add_history(trainer)
        if stage == "fit" and self._base is None:
            self._base = ThreadPoolExecutor(1).submit(base_hash, str(getattr(pl_module, "base_name", "")))

    def _made_of(self, trainer: L.Trainer) -> dict[str, str]:
        base = self._base.result() if self._base else ""
        data = manifest(trainer.datamodule)  # type: ignore[attr-defined]
        return {"model.base": base[:16], "data.path": data, "processes": str(trainer.world_size)}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what the run is made of, and where every process's generators stand."""
        generators: list[Any] = [states()]
        if trainer.world_size > 1:
            generators = [None] * trainer.world_size
            torch.distributed.all_gather_object(generators, states())
        facts = {"version": __version__, "recipe": what_matters(self.recipe), "made_of": self._made_of(trainer)}
        checkpoint[KEY] = {**facts, "generators": generators}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare, and remember where the generators stood."""
        saved = checkpoint.get(KEY)
        if saved is None or trainer.state.fn != "fit":
            return
        made_of = self._made_of(trainer)
        changed = differences(saved["recipe"], what_matters(self.recipe), self.allow_changed)
        changed += differences(saved["made_of"], made_of, self.allow_changed)
        refuse_differences(str(trainer.ckpt_path), changed)
        self._states = saved["generators"]
        self._changed = [line.partition(":")[0] for line in differences(saved["recipe"], what_matters(self.recipe))]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is logged, and what the optimizer is asked for, is this run's from here on."""
        begin(trainer, self._states is not None)
        self._take_options(trainer)

    def _take_options(self, trainer: L.Trainer) -> None:
        """Let the optimizer have what the recipe changed of its own; the rates are the schedule's to set."""
        names = {key.removeprefix(OPTIONS) for key in self._changed if key.startswith(OPTIONS)} - {"lr"}
        for optimizer in trainer.optimizers:
            for name in names & optimizer.defaults.keys():
                for group in optimizer.param_groups:
                    group[name] = optimizer.defaults[name]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The generators stand where they stood; dropout's follow from the place in the run alone."""
        if self._states is not None:
            restore(self._states[min(trainer.global_rank, len(self._states) - 1)])
            self._states = None
        seed_dropout(trainer.global_step, batch_idx % trainer.accumulate_grad_batches)


class Finish(L.Callback):
    """Does the end of a run whose last step was done, and that was killed before all was saved, compared and sampled.

    Lightning begins no training where no step is left, and so would end none. To come before all other callbacks.
    """

    def __init__(self) -> None:
        self._began = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._began or not trainer.ckpt_path or not trainer.fit_loop.done:
            return
        trainer.training = True
        pl_module.to(trainer.strategy.root_device)  # Lightning has taken it off, as where a run has ended
        for hook in ("on_train_start", "on_train_end"):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                getattr(callback, hook)(trainer, pl_module)
            getattr(pl_module, hook)()
