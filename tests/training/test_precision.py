"""The precision of a run that names none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratune.recipe.run import run
from loratune.training import precision
from loratune.training.precision import cpu_has_bfloat16, fast_precision


@pytest.mark.parametrize(("flag", "units"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_a_cpu_computes_bfloat16_only_where_it_has_units(
    flag: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert cpu_has_bfloat16() is units
    assert fast_precision("cpu") == ("bf16-mixed" if units else "32-true")


@pytest.mark.parametrize(("units", "name"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_without_bfloat16_gets_float16(units: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units)
    assert [fast_precision(accelerator) for accelerator in ("auto", "gpu", "cuda")] == [name] * 3


def test_the_recipe_decides_and_the_device_where_it_says_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    assert run(["-c", str(recipe)], execute=False).trainer.precision == "32-true"
    recipe.write_text(recipe.read_text().replace("  precision: 32-true\n", ""))
    assert run(["-c", str(recipe)], execute=False).trainer.precision == "bf16-mixed"
