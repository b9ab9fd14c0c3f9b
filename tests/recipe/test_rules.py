"""Every rule across a recipe's keys: a recipe that breaks it and no other, and the words that say so."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import UserError
from loratune.recipe import rules
from loratune.recipe.rules import RULES, Recipe, check

FULL = {"class_path": "loratune.training.diffusion_module.DiffusionModule", "init_args": {}}
EARLY = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}]


def recipe(changes: dict[str, Any], verb: str = "fit") -> Recipe:
    """A recipe that is right but for the changes of dotted keys."""
    tree: dict[str, Any] = {
        "trainer": {"max_steps": 10},
        "model": {"base": "builtin:emoji-64", "lora": {"type": "lora", "targets": "attention"}},
        "data": {"path": "images", "validation_percent": 5},
        "samples": {"every_n_steps": 0},
        "export": {"format": "peft"},
    }
    for key, value in changes.items():
        place, (*parts, last) = tree, key.split(".")
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = deepcopy(value)
    return Recipe(tree, verb)


UNLOADED = {"model.memory": {"unload_encoders": True}}
NAMED_FULL = {"model": FULL}
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("counts_are_positive", {"trainer.accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; give 1 or more"),
    ("counts_are_positive", {"trainer.log_every_n_steps": 0}, "trainer.log_every_n_steps is 0; give 1 or more"),
    ("no_older_sharding", {"trainer.strategy": "fsdp"}, "set fsdp2"),
    ("what_can_be_sharded", {"trainer.strategy": "fsdp2", "model.tokens": {"token": "x"}}, "not with model.tokens"),
    ("what_can_be_sharded", {"trainer.strategy": "fsdp2", "model.lora.init": "olora"}, "not with model.lora.init"),
    ("what_can_be_sharded", {"trainer.strategy": "fsdp2", "model.memory.quantization": "nf4"}, "memory.quantization"),
    ("what_can_be_sharded", {"trainer.strategy": "fsdp2", "model.memory.compile": True}, "model.memory.compile"),
    ("what_can_be_sharded", {"trainer.strategy": "fsdp2", **NAMED_FULL}, "not with model.class_path"),
    ("changed_weights_are_exact", {"model.lora.init": "pissa", "model.memory.dtype": "bfloat16"}, "init: kaiming"),
    ("changed_weights_are_exact", {"model.lora.init": "olora", "model.memory.quantization": "int8"}, "init: kaiming"),
    ("trained_weights_are_exact", {**NAMED_FULL, "model.init_args": {"memory": {"dtype": "float16"}}}, "train a LoRA"),
    (
        "what_sits_on_quantized_layers",
        {"model.memory.quantization": "nf4", "model.lora.type": "loha", "export.format": "kohya"},
        "set lora.type to lora or dora",
    ),
    (
        "the_whole_base_is_written",
        {**NAMED_FULL, "model.init_args": {"memory": {"unload_encoders": True}}},
        "all of the base is written",
    ),
    ("encoders_are_needed_in_each_step", {**UNLOADED, "model.lora.text_encoder": True}, "as it is trained"),
    ("encoders_are_needed_in_each_step", {**UNLOADED, "model.tokens": {"token": "x"}}, "as it is trained"),
    ("encoders_are_needed_in_each_step", {**UNLOADED, "data.cache_latents": False}, "data.cache_latents is false"),
    ("encoders_are_needed_in_each_step", {**UNLOADED, "data.captions": {"shuffle_tags": True}}, "shuffle_tags"),
    ("encoders_are_needed_in_each_step", {**UNLOADED, "data.captions": {"tag_dropout": 0.1}}, "tag_dropout"),
    ("samples_need_encoders", {**UNLOADED, "samples.every_n_steps": 5}, "set samples.every_n_steps: 0"),
    ("the_format_holds_the_adapter", {"model.lora.type": "lokr"}, "set export.format: kohya"),
    ("only_a_lora_is_written_between", {**NAMED_FULL, "export.every_n_steps": 2}, "set export.every_n_steps: 0"),
    ("something_is_trained", {"model.lora.targets": "none"}, "set model.tokens, or other targets"),
    ("the_first_lora_is_there", {"model.lora.init_from": Path("nowhere.safetensors")}, "nowhere.safetensors: no such"),
    ("what_is_watched_is_measured", {"checkpoint.monitor": "val/loss", "data.validation_percent": 0}, "held out"),
    ("what_is_watched_is_measured", {"trainer.callbacks": EARLY, "data.validation_percent": 0}, "trainer.callbacks"),
    ("prefixes_fit", {"data.caption_prefix": "cat " * 90}, "data.caption_prefix is 90 tokens"),
    (
        "prefixes_fit",
        {"data.sources": [{"path": "a", "caption_prefix": "cat " * 80}]},
        "sources[0].caption_prefix is 80",
    ),
    ("the_loss_fits_the_base", {"model.objective": {"zero_terminal_snr": True, "prediction": "eps"}}, "objective"),
]


@pytest.mark.parametrize(("name", "changes", "words"), ROWS)
def test_a_rule_alone_refuses_what_breaks_it(
    name: str, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as refusal:
        check(recipe(changes))
    assert words in str(refusal.value)
    monkeypatch.setattr(rules, "RULES", [rule for rule in RULES if rule.__name__ != name])
    check(recipe(changes))


def test_nothing_is_held_out_to_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"data.validation_percent": 0}
    for verb in ("validate", "test"):
        with pytest.raises(UserError, match=f"loratune {verb} needs images that are held out"):
            check(recipe(nothing, verb))
        check(recipe({**nothing, "data.sources": [{"path": "x", "role": "validation"}]}, verb))
    check(recipe(nothing, "fit"))
    monkeypatch.setattr(rules, "RULES", [rule for rule in RULES if rule is not rules.something_is_validated])
    check(recipe(nothing, "validate"))


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check(recipe({"model.lr_schedule": {"warmup_steps": 10}}), lambda key: f"f.yaml:3 ({key}): ")
    assert "f.yaml:3 (model.lr_schedule.warmup_steps): " in caplog.text
    assert "warmup_steps is 10, but trainer.max_steps is 10" in caplog.text
    caplog.clear()
    check(recipe({"model.lr_schedule": {"warmup_steps": 9}}))
    assert not caplog.text


def test_every_rule_has_its_row() -> None:
    assert {rule.__name__ for rule in RULES} == {name for name, _, _ in ROWS} | {"something_is_validated"}


RIGHT: list[dict[str, Any]] = [
    {},
    {"trainer.strategy": "fsdp2"},
    {"trainer.strategy": "ddp", "model.tokens": {"token": "x"}},
    {"model.lora.init": "pissa"},
    {"model.memory.quantization": "nf4"},
    {"model.memory.quantization": "nf4", "model.lora.type": "dora"},
    {"model.lora.type": "loha", "export.format": "kohya"},
    {"model.lora.targets": "none", "model.lora.text_encoder": True},
    {"model.lora.targets": "none", "model.tokens": {"token": "x"}},
    {**UNLOADED},
    {**NAMED_FULL, "model.init_args": {"trainable": [], "memory": {"dtype": "bfloat16"}}},
    {"model.lr_schedule": {"warmup_steps": 9}},
    {"model.lr_schedule": {"warmup_steps": 500}, "trainer.max_steps": -1},
    {"checkpoint.monitor": "train/loss", "data.validation_percent": 0},
    {"checkpoint.monitor": "val/loss"},
    {"data.caption_prefix": "cat " * 60},
    {"data.caption_prefix": "cat " * 90, "model.prompts": {"chunks": 2}},
    {"samples.every_n_steps": 5},
    {"data": None, "samples": None},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_what_goes_together_is_let_through(changes: dict[str, Any]) -> None:
    check(recipe(changes))


def test_a_module_named_by_its_class_is_judged_like_the_nameless() -> None:
    model = {"base": "x", "lora": {"type": "lokr"}}
    named = {"class_path": "loratune.training.lora_module.LoRAModule", "init_args": model}
    for shape in (model, named, {**named, "class_path": "LoRAModule"}):
        with pytest.raises(UserError, match=r"f\.yaml:3: export\.format: peft cannot hold lokr"):
            check(recipe({"model": shape}), lambda key: "f.yaml:3: " if key == "export.format" else "")


def test_the_rules_need_nothing_heavy() -> None:
    code = "import sys, loratune.recipe.rules, loratune.recipe.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
