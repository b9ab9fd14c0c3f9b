"""Every rule across a recipe's objects, in one list; rules of one object stand in its own dataclass.

A rule is a pure function of the parsed recipe: it returns what is wrong, beginning with the key, or None. All are run
before a weight is read, and by every verb that takes a recipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratune.errors import UserError

log = logging.getLogger(__name__)

SHARDED = "fsdp2"
FROM_BASE = ("pissa", "olora")
WITHOUT_PEFT = ("loha", "lokr")
LORA = "LoRAModule"
LEAST = {"trainer.accumulate_grad_batches": 1, "trainer.log_every_n_steps": 1}
"""What Lightning divides by."""


class Recipe:
    """A parsed recipe, in which the module's keys are found in one place whether it is named by its class or not.

    Args:
        tree: the recipe as nested mappings.
        verb: that is to run; empty where the recipe is only looked at.
    """

    def __init__(self, tree: Mapping[str, Any], verb: str = "") -> None:
        model = tree.get("model") or {}
        self.module = str(model.get("class_path", LORA)).rpartition(".")[2]
        self.tree = {**tree, "model": (model.get("init_args") or {}) if "class_path" in model else model}
        self.verb = verb

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; the default where the key, or what it is below, is not there or null."""
        value: Any = self.tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained."""
        return self.module == "DiffusionModule" and bool(self.get("model.trainable", True))

    @property
    def trains_text(self) -> bool:
        """Whether captions are encoded anew in each step."""
        return bool(self.get("model.lora.text_encoder")) or self.get("model.tokens") is not None

    @property
    def holds_out(self) -> bool:
        """Whether any image is held out for validation."""
        sources = self.get("data.sources", [])
        return bool(self.get("data.validation_percent", 5)) or any(each.get("role") == "validation" for each in sources)


Rule = Callable[[Recipe], str | None]


def no_older_sharding(recipe: Recipe) -> str | None:
    """FSDP of the first kind cuts what is frozen and what is trained alike."""
    strategy = recipe.get("trainer.strategy")
    if isinstance(strategy, str) and strategy.startswith("fsdp") and strategy != SHARDED:
        return f"trainer.strategy is {strategy}, an older form that is not built for here; set {SHARDED}"
    return None


def what_can_be_sharded(recipe: Recipe) -> str | None:
    """What is not with weights that are cut over devices."""
    if recipe.get("trainer.strategy") != SHARDED:
        return None
    refused = {
        "model.tokens": recipe.get("model.tokens") is not None,
        "model.lora.init": recipe.get("model.lora.init") in FROM_BASE,
        "model.memory.quantization": recipe.get("model.memory.quantization") is not None,
        "model.memory.compile": recipe.get("model.memory.compile", False),
        "model.class_path": recipe.get("model.lora") is None,
    }
    key = next((key for key, refuse in refused.items() if refuse), None)
    reason = f"which is not with {key} as given; change that, or set ddp"
    return f"trainer.strategy is {SHARDED}, {reason}" if key else None


def samples_need_encoders(recipe: Recipe) -> str | None:
    """Samples are encoded and decoded."""
    steps = recipe.get("samples.every_n_steps", 0)
    if recipe.get("model.memory.unload_encoders") and steps:
        reason = f"samples.every_n_steps is {steps}, and samples need the VAE and the text encoders"
        return f"model.memory.unload_encoders is true, but {reason}; set samples.every_n_steps: 0"
    return None


def encoders_are_needed_in_each_step(recipe: Recipe) -> str | None:
    """What is not the same in each step is not in the cache."""
    if not recipe.get("model.memory.unload_encoders"):
        return None
    reasons = {
        "the text encoder is needed in every step, as it is trained": recipe.trains_text,
        "data.cache_latents is false, so that images are encoded in each step": not recipe.get(
            "data.cache_latents", True
        ),
        "data.captions.shuffle_tags and tag_dropout make captions that have to be encoded in each step": (
            recipe.get("data.captions.shuffle_tags", False) or recipe.get("data.captions.tag_dropout", 0) > 0
        ),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    remedy = "set model.memory.unload_encoders: false"
    return f"model.memory.unload_encoders is true, but {reason}; {remedy}" if reason else None


def the_whole_base_is_written(recipe: Recipe) -> str | None:
    """A fine-tuned base is saved with its encoders."""
    if recipe.get("model.memory.unload_encoders") and recipe.trains_base:
        return "model.memory.unload_encoders is true, but all of the base is written at the end; leave it out"
    return None


def trained_weights_are_exact(recipe: Recipe) -> str | None:
    """Small steps vanish in few bits."""
    if (key := _reduced(recipe)) and recipe.trains_base:
        reason = "is for a frozen base, and here its weights are trained; leave it out, or train a LoRA"
        return f"{key} is {recipe.get(key)}: it {reason}"
    return None


def changed_weights_are_exact(recipe: Recipe) -> str | None:
    """PiSSA and OLoRA take their factors out of W_0."""
    init = recipe.get("model.lora.init")
    if (key := _reduced(recipe)) and init in FROM_BASE:
        reason = f"lora.init {init} changes W_0 itself, which has to be held in float32"
        return f"{key} is {recipe.get(key)}, but {reason}; set lora.init: kaiming"
    return None


def _reduced(recipe: Recipe) -> str | None:
    """The key by which the base is held in few bits."""
    if recipe.get("model.memory.quantization"):
        return "model.memory.quantization"
    return "model.memory.dtype" if recipe.get("model.memory.dtype", "float32") != "float32" else None


def what_sits_on_quantized_layers(recipe: Recipe) -> str | None:
    """peft has LoRA and DoRA beside layers of 4 and 8 bits."""
    bits, kind = recipe.get("model.memory.quantization"), recipe.get("model.lora.type")
    if bits and kind in WITHOUT_PEFT:
        return f"model.memory.quantization is {bits}: not with lora.type {kind}; set lora.type to lora or dora"
    return None


def the_format_holds_the_adapter(recipe: Recipe) -> str | None:
    """peft's keys have no LoHa and LoKr."""
    kind = recipe.get("model.lora.type")
    if recipe.get("export.format") == "peft" and kind in WITHOUT_PEFT:
        return f"export.format: peft cannot hold {kind}; set export.format: kohya"
    return None


def only_a_lora_is_written_between(recipe: Recipe) -> str | None:
    """Checkpoints keep what else is trained."""
    steps = recipe.get("export.every_n_steps", 0)
    if steps and recipe.get("model.lora") is None:
        reason = f"only a LoRA is written before the end, and the model is {recipe.module}"
        return f"export.every_n_steps is {steps}: {reason}; set export.every_n_steps: 0"
    return None


def something_is_trained(recipe: Recipe) -> str | None:
    """Without targets there is only a token, or a text encoder."""
    if recipe.get("model.lora.targets") == "none" and not recipe.trains_text:
        return "model.lora.targets is none and nothing else is trained; set model.tokens, or other targets"
    return None


def the_first_lora_is_there(recipe: Recipe) -> str | None:
    """A LoRA to begin with is a file."""
    path = recipe.get("model.lora.init_from")
    if path and not Path(str(path)).is_file():
        return f"model.lora.init_from {path}: no such file; give a LoRA, or leave it out"
    return None


def warmup_ends(recipe: Recipe) -> str | None:
    """A rate that only rises reaches nothing."""
    warmup, steps = recipe.get("model.lr_schedule.warmup_steps", 0), recipe.get("trainer.max_steps", -1)
    if 0 < steps <= warmup:
        reason = f"trainer.max_steps is {steps}, so that the learning rate never gets to its value"
        return f"model.lr_schedule.warmup_steps is {warmup}, but {reason}; give fewer"
    return None


def counts_are_positive(recipe: Recipe) -> str | None:
    """Lightning divides by them."""
    for key, least in LEAST.items():
        if (value := recipe.get(key, least)) < least:
            return f"{key} is {value}; give {least} or more"
    return None


def what_is_watched_is_measured(recipe: Recipe) -> str | None:
    """The validation loss is measured on images that are held out."""
    watched = {"checkpoint.monitor": recipe.get("checkpoint.monitor")}
    for callback in _listed(recipe.get("trainer.callbacks")):
        if str(callback.get("class_path")).endswith("EarlyStopping"):
            watched["trainer.callbacks"] = callback.get("init_args", {}).get("monitor")
    logged = ("step", "epoch", "train/")
    key = next((key for key, name in watched.items() if name and not str(name).startswith(logged)), None)
    if key and not recipe.holds_out:
        reason = f"watches {watched[key]!r}, and no image is held out"
        return f"{key} {reason}; set data.validation_percent, or give a source the role validation"
    return None


def something_is_validated(recipe: Recipe) -> str | None:
    """Without images that are held out there is nothing to say."""
    if recipe.verb in ("validate", "test") and not recipe.holds_out:
        reason = f"loratune {recipe.verb} needs images that are held out"
        return f"data.validation_percent is 0: {reason}; raise it, or give a source the role validation"
    return None


def prefixes_fit(recipe: Recipe) -> str | None:
    """A prefix that fills the window leaves no room for the caption."""
    longest = max((len(text.encode()) for _, text in _prefixes(recipe.get("data"), "data")), default=0)
    if not longest:
        return None  # a token has at least one byte, and reading the tokenizer takes a second
    from loratune.training.triggers import too_long

    settings = recipe.get("model.prompts", {}), recipe.get("model.tokens")
    return too_long(_prefixes(recipe.get("data"), "data"), *settings)


def the_loss_fits_the_base(recipe: Recipe) -> str | None:
    """Which losses make sense depends on what the base predicts, and whether its noise has an end."""
    base, objective = recipe.get("model.base"), recipe.get("model.objective")
    if not isinstance(base, str) or not objective:
        return None
    from loratune.training.objectives import Objective

    try:
        Objective(**{key: value for key, value in objective.items() if key != "timesteps"}).check_named(base)
    except ValueError as error:
        return f"model.objective: {error}"
    return None


def _listed(callbacks: Any) -> list[Mapping[str, Any]]:
    callbacks = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    return [callback for callback in callbacks if isinstance(callback, Mapping)]


def _prefixes(tree: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every caption_prefix of the data, with its key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "caption_prefix" and isinstance(value, str):
                yield f"{place}.{key}", value
            yield from _prefixes(value, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _prefixes(value, f"{place}[{index}]")


RULES: tuple[Rule, ...] = (
    counts_are_positive,
    no_older_sharding,
    what_can_be_sharded,
    changed_weights_are_exact,
    trained_weights_are_exact,
    what_sits_on_quantized_layers,
    the_whole_base_is_written,
    encoders_are_needed_in_each_step,
    samples_need_encoders,
    the_format_holds_the_adapter,
    only_a_lora_is_written_between,
    something_is_trained,
    the_first_lora_is_there,
    what_is_watched_is_measured,
    something_is_validated,
    prefixes_fit,
    the_loss_fits_the_base,
)


NOTES: tuple[Rule, ...] = (warmup_ends,)
"""What is said and lets the recipe run: a short trial of a long recipe, say."""


def check(recipe: Recipe, place: Callable[[str], str] = lambda key: "") -> None:
    """Run every rule.

    Args:
        recipe: the parsed recipe.
        place: `FILE:LINE: ` of a key.

    Raises:
        UserError: one is broken.
    """
    for rule in RULES:
        if message := rule(recipe):
            raise UserError(f"{place(message.split()[0].rstrip(':'))}{message}")
    for note in NOTES:
        if (text := note(recipe)) is not None:
            log.warning("%s%s", place(text.split(" ", 1)[0]), text)
