"""Before a run begins: whether its data will do, which checkpoint it goes on from, and whether its folder is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from loratune.data.audit import audit
from loratune.data.module import CaptionedImages
from loratune.errors import UserError
from loratune.families.base import Base
from loratune.families.known import family_of
from loratune.families.prompts import Prompts
from loratune.lora.tokens import WINDOW, NewToken
from loratune.runs.checkpoints import last_checkpoint
from loratune.runs.folder import refuse_another, refuse_foreign, take
from loratune.runs.resume import check_recipe
from loratune.training.captions import counter


def prepare(verb: str, chosen: Any, recipe: Callable[[], str]) -> None:
    """Put the checkpoint's path into a recipe, take the run's folder and compare both; no weight is read.

    Args:
        verb: fit, validate or test.
        chosen: the parsed recipe; its `ckpt_path` is changed in place.
        recipe: gives it as YAML.

    Raises:
        UserError: the folder is in use or holds another run, or the checkpoint is another run's.
    """
    folder, wanted = Path(chosen.trainer.default_root_dir), chosen.get("ckpt_path")
    if wanted is None and verb == "fit" and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        wanted = "last"  # the batch system runs the same command again
    if wanted in ("last", "hpc"):
        last = last_checkpoint(Path(chosen.checkpoint.dirpath))
        chosen.ckpt_path = None if last is None else str(last)
        if last is None and verb != "fit":
            raise UserError(f"{chosen.checkpoint.dirpath}: holds no checkpoint; give --ckpt_path FILE")
    if verb != "fit":
        return
    resumed = Path(chosen.ckpt_path) if chosen.get("ckpt_path") not in (None, "best") else None
    if resumed is not None and chosen.run.overwrite:
        raise UserError(f"run.overwrite is true, and --ckpt_path {wanted} goes on with a run; leave out one of them")
    if is_first():
        take(folder)
        if chosen.run.overwrite:
            refuse_foreign(folder)
        else:
            refuse_another(folder, resumed, wanted in ("last", "hpc"))
    if resumed is not None:
        check_recipe(resumed, recipe(), chosen.run.allow_changed)


def check_data(chosen: Any) -> None:
    """See that a recipe's images can be trained on, as far as names, captions and headers tell; no weight is read.

    Args:
        chosen: the parsed recipe.

    Raises:
        UserError: a source is empty, captions are missing, a mask is of another size, or the base's VAE cannot take
            the images' size.
    """
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(CaptionedImages, "data")
    data: CaptionedImages = parser.instantiate_classes(Namespace(data=chosen.data)).data
    model = chosen.model.get("init_args") or chosen.model
    if is_first() and data.strict:
        refuse_faults(data, model)
    elif is_first():
        data.check(warn=False)
    if (configs := _configs(model.get("base"))) is not None:
        data.check_sizes(Sizes(configs))


def _configs(base: Any) -> Mapping[str, Mapping[str, Any]] | None:
    """Of a named base; what is wrong with it is told when it is loaded, after all that is wrong with the recipe."""
    try:
        opened = Base.open(base) if isinstance(base, str) else None
        return opened.configs if opened is not None and not opened.missing else None
    except UserError:
        return None


def refuse_faults(data: CaptionedImages, model: Any) -> None:
    """Raise UserError for the first thing in a recipe's images that cannot be meant, each of which is looked at."""
    prompts, token = model.get("prompts"), model.get("tokens")
    prompts = Prompts(**prompts.as_dict()) if prompts else Prompts()
    count = counter(prompts, NewToken(**token.as_dict()) if token else None)
    faults = audit(data.collection, data.batch_size, count, WINDOW * prompts.chunks, data.num_workers).serious
    for finding in faults:
        if finding.kind == "no_caption" and data.allow_missing_captions:
            continue
        more = f" and {len(finding.names) - 1} more" if len(finding.names) > 1 else ""
        fault = f"{len(finding.names)} {finding.message}: {finding.names[0]}{more}"
        remedy = f"{finding.mend}, or set data.strict: false (loratune data RECIPE lists all)"
        raise UserError(f"data.strict: {fault}; {remedy}")


class Sizes:
    """What a base's configurations say of the images' sizes.

    Args:
        configs: by component.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.configs = configs

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Raise UserError for a size in pixels that the base cannot take."""
        return family_of(self.configs).latent_shape(self.configs, height, width)


def is_first() -> bool:
    """Whether this is the first process of the run; launchers say so before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0
