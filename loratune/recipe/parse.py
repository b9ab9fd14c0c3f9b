"""Recipes: LightningCLI with our sections, our defaults, and mistakes told in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from jsonargparse import Namespace, _typehints
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from loratune import __version__
from loratune.data.module import CaptionedImages
from loratune.errors import UserError
from loratune.evaluation.evaluate import Evaluate
from loratune.evaluation.samples import SampleGrid
from loratune.families.pixels import PixelDDPM
from loratune.families.sd import NewStableDiffusion
from loratune.formats.atomic import atomic_path
from loratune.recipe.code import functions, importing
from loratune.recipe.empty import empty_keys
from loratune.recipe.mistakes import Entry, explain, foreign, place
from loratune.recipe.rules import Recipe, check
from loratune.runs.checkpoints import Checkpoints, use_atomic
from loratune.runs.folder import clear, give_back
from loratune.runs.guard import Guard
from loratune.runs.loggers import Events, log_text
from loratune.runs.prepare import check_data, is_first, prepare
from loratune.runs.progress import StepBar, closing
from loratune.runs.resume import Finish, Run
from loratune.runs.stopping import SIGNALS
from loratune.training.autoencoder import AutoencoderModule
from loratune.training.contrastive import ContrastiveModule
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.ema import EMA
from loratune.training.export import Export
from loratune.training.lora_module import LoRAModule
from loratune.training.monitor import Monitor
from loratune.training.precision import fast_precision

SHORT_NAMES = (
    AutoencoderModule,
    ContrastiveModule,
    DiffusionModule,
    EMA,
    LoRAModule,
    NewStableDiffusion,
    PixelDDPM,
)
"""Imported so that recipes can name them without their modules."""

SECTIONS = {
    "run": Run,
    "export": Export,  # first: a run's result is on disk before anything is sampled, compared or drawn at its end
    "samples": SampleGrid,
    "evaluation": Evaluate,
    "checkpoint": Checkpoints,
    "guard": Guard,
}
"""What fills a recipe's sections beside trainer, model and data."""


def own_defaults(_: Any, before: Any, value: Any) -> None:
    """Let a class that is named in the place of another have its own defaults, such as Prodigy's rate of 1.

    jsonargparse keeps what was set, or is a default, of the class before wherever the new one has an argument of the
    same name; it has no setting for that.
    """
    if before and "init_args" in before and before["class_path"] != value["class_path"]:
        before["init_args"] = Namespace()


_typehints.discard_init_args_on_class_path_change = own_defaults


class Source(NamedTuple):
    """What is known of a recipe before it is parsed.

    Args:
        entries: every key with its file and line.
        named: whether the module is named by its class; without a name it is a LoRA.
        allow_code: whether class paths may name code from outside the libraries that are known.
    """

    entries: Sequence[Entry]
    named: bool
    allow_code: bool


class RecipeParser(LightningArgumentParser):
    """Raises a mistake instead of printing 58 lines of usage, and opens no file but recipes.

    Where a value may be an object, jsonargparse tries a string as the path of a configuration: it would read a
    checkpoint of gigabytes as text, several times.
    """

    source = Source((), False, False)

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        """Raise what the command line prints as one line."""
        raise UserError(explain(message, self.source.entries, KeyNames(self.source.named)))

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """What `loratune VERB --help` prints: our sections first; Lightning's Trainer, the longest, last."""
        self.usage = f"loratune {self.prog.split()[-1]} -c RECIPE [--KEY VALUE ...]"
        self.description = "Each key below stands in the recipe, or as --KEY VALUE here, which overrides the recipe."
        groups: Any = self._action_groups
        groups.sort(key=lambda group: any("trainer" in action.dest for action in group._group_actions))
        return super().format_help(*args, **kwargs)

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> Any:
        return super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})


class SaveRecipe(SaveConfigCallback):
    """Keeps the resolved recipe in the run: as a file, in TensorBoard, and inside the LoRA."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.save_to_log_dir = False
        text = self.parser.dump(self.config, skip_none=False)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Export | Run):
                callback.recipe = text  # in every process; below is the first one's alone
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.config.run.overwrite:  # only now, as everything of the new run could be built and encoded
            clear(Path(trainer.default_root_dir))
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "recipe.yaml") as path:
            path.write_text(text, encoding="utf-8")
        log_text(trainer, "recipe", f"```yaml\n{text}\n```")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(flat_numbers(yaml.safe_load(text)), {"val/loss": float("nan")})


def flat_numbers(tree: Any, prefix: str = "") -> dict[str, float | str]:
    """A recipe's model and data settings as flat names and values, for TensorBoard's table of runs."""
    if isinstance(tree, dict):
        parts = [(key, value) for key, value in tree.items() if prefix or key in ("model", "data", "seed_everything")]
        numbers: dict[str, float | str] = {}
        for key, value in parts:
            numbers |= flat_numbers(value, f"{prefix}.{key}" if prefix else key)
        return numbers
    return {prefix: tree if isinstance(tree, int | float) else str(tree)} if tree is not None else {}


class RecipeCLI(LightningCLI):
    """`loratune fit|validate|test`: a recipe's sections are the signatures of what they fill."""

    def __init__(self, source: Source, **kwargs: Any) -> None:
        self.source = source
        RecipeParser.source = source  # of the class, as the parser makes others of its class for what is within
        super().__init__(**kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, with our errors."""
        kwargs.setdefault("dump_header", [f"loratune {__version__}"])
        parser = RecipeParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="A recipe (YAML); later ones override earlier ones."
        )
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's sub-commands but predict: `loratune sample` draws."""
        return {name: arguments for name, arguments in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections beside trainer, model and data."""
        for section, filled_by in SECTIONS.items():
            parser.add_lightning_class_args(filled_by, section)
        defaults = {"dirpath": None, "save_last": True, "save_top_k": 1, "every_n_train_steps": 250}
        defaults["enable_version_counter"] = False  # last.ckpt is one file
        parser.set_defaults({"trainer.log_every_n_steps": 10, "trainer.enable_model_summary": False})
        parser.set_defaults({"trainer.use_distributed_sampler": False})  # batches are cut among processes by us
        parser.set_defaults({f"checkpoint.{key}": value for key, value in defaults.items()})

    @property
    def _chosen(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Where the run's files go: the recipe's name under runs/, unless it says."""
        config, entries = self._chosen, self.source.entries
        parser = self._parser(self.subcommand) if self.subcommand else self.parser
        if key := next(empty_keys(parser._actions, config), None):
            raise UserError(f"{place(key, entries)}'{key}' is empty; give it a value, or leave it out")
        if not self.source.allow_code and (name := next(functions(config), None)):
            raise UserError(f"{place(name, entries)}{foreign(name)}")
        if config.trainer.default_root_dir is None:
            recipes = config.get("config")
            config.trainer.default_root_dir = str(Path("runs") / (Path(str(recipes[-1])).stem if recipes else "run"))
        if config.trainer.precision is None:
            config.trainer.precision = fast_precision(str(config.trainer.accelerator))
        if self.subcommand and config.get("weights_only") is None:
            config.weights_only = True  # a checkpoint is data; nothing in it is run
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(config.trainer.default_root_dir) / "checkpoints")
        check(Recipe(config.as_dict(), self.subcommand or ""), lambda key: place(key, entries))
        if self.subcommand:
            check_data(config)
            prepare(self.subcommand, config, lambda: self._parser(self.subcommand).dump(config, skip_none=False))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's trainer with TensorBoard in the run's folder, one progress bar and our monitor."""
        trainer = self._chosen.trainer
        if trainer.logger in (None, True):
            kwargs["logger"] = Events(trainer.default_root_dir)
        callbacks: list[Callback] = [Finish(), Monitor(), LearningRateMonitor("step")]
        if trainer.enable_progress_bar in (None, True) and "ProgressBar" not in str(trainer.callbacks):
            callbacks.append(StepBar())
        self.trainer_defaults["callbacks"] = callbacks
        return use_atomic(super().instantiate_trainer(**kwargs))


def build(argv: Sequence[str], source: Source, execute: bool) -> RecipeCLI:
    """Parse a recipe, build its objects and run the sub-command that argv begins with; the work of `recipe.run.run`.

    Raises:
        UserError: a mistake in the recipe, told in one line.
        ValueError: likewise, by what a section fills.
    """
    torch.set_float32_matmul_precision("high")
    if execute and argv[0] == "fit":
        SIGNALS.listen()
    try:
        with importing(source.allow_code):
            cli = RecipeCLI(
                source,
                model_class=L.LightningModule if source.named else LoRAModule,
                datamodule_class=CaptionedImages,
                subclass_mode_model=source.named,
                auto_configure_optimizers=False,
                save_config_callback=SaveRecipe,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                args=list(argv),
                run=execute,
            )
        if execute and argv[0] == "fit" and is_first():
            print(closing(cli.trainer))
        return cli
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        SIGNALS.forget()
        give_back()


class KeyNames:
    """Dotted names of all keys of a recipe, made only when a message needs them."""

    def __init__(self, named: bool) -> None:
        self.named = named

    def __iter__(self) -> Any:
        parser = LightningArgumentParser()
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.add_lightning_class_args(
            L.LightningModule if self.named else LoRAModule, "model", subclass_mode=self.named
        )
        parser.add_lightning_class_args(CaptionedImages, "data")
        for section, filled_by in SECTIONS.items():
            parser.add_lightning_class_args(filled_by, section)
        names = {str(action.dest) for action in parser._actions} | {"seed_everything", "ckpt_path"}
        return iter(sorted(names))
