"""A format of LoRA files that adds itself by one row is read, written, inspected, converted and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratune.cli.main import main
from loratune.lora.convert import convert
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.tables.known import TABLES
from loratune.lora.tables.table import ALPHA, DOWN, UP, Part, Place, Table, Written

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def spell(name: str) -> tuple[str, ...]:
    return (f"toy/{name.replace('.', '/')}",)


def alpha(stored: float | None, place: Place) -> float:
    """The file has alpha / r, and 2 where it has nothing."""
    return place.rank * (2.0 if stored is None else stored)


def write(layers: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: Any) -> Written:
    tensors = {}
    for name, layer in layers.items():
        for field, value in layer.tensors().items():
            tensors[spell(name)[0] + TOY.suffix(Part(layer.kind, field))] = value.to(dtype or value.dtype)
        tensors[spell(name)[0] + TOY.suffix(ALPHA)] = torch.tensor(layer.scale, dtype=torch.float64)
    return tensors, {"toy": "1"}


TOY = Table("toy", "^toy/", {":A": DOWN, ":B": UP, ":scale": ALPHA}, spell, alpha=alpha, write=write)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, TOY.name, TOY)


def layers() -> dict[str, LowRank]:
    random = torch.Generator().manual_seed(0)

    def layer(out: int, inner: int, alpha: float) -> LoRALayer:
        return LoRALayer(torch.randn(4, inner, generator=random), torch.randn(out, 4, generator=random), alpha)

    return {QUERY: layer(320, 320, 3.0), TEXT: layer(768, 768, 3.0)}


def test_it_is_written_and_read(tmp_path: Path) -> None:
    lora = LoRAFile(layers())
    write_lora(tmp_path / "a.safetensors", lora, "toy")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors[spell(QUERY)[0] + ":scale"] == 0.75
    assert len(tensors) == 6
    assert read_lora(tmp_path / "a.safetensors") == LoRAFile(lora.layers, {"toy": "1"})


def test_its_names_meet_other_suffixes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    raw, layer = spell(QUERY)[0], layers()[QUERY]
    for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"), (":A", ":B")):
        save_file({raw + down: layer.down, raw + up: layer.up}, tmp_path / "a.safetensors")
        assert read_lora(tmp_path / "a.safetensors").layers == {QUERY: LoRALayer(layer.down, layer.up, 8.0)}


def test_it_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers()), "toy")
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["format"], found["family"]) == ("LoRA", "toy", "Stable Diffusion 1.x")
    assert (found["rank"], found["alpha"], found["layers"]) == ([4], [3.0], 2)
    assert found["readers"]["loratune"]["loads"] == "whole"
    assert found["readers"]["diffusers"]["loads"] != "whole"


@pytest.mark.parametrize("other", ["peft", "kohya"])
def test_it_is_converted_both_ways(tmp_path: Path, other: str) -> None:
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers()), "toy")
    convert(tmp_path / "a.safetensors", other, tmp_path / "b.safetensors", None, None)  # type: ignore[arg-type]
    assert read_lora(tmp_path / "b.safetensors").layers == layers()
    convert(tmp_path / "b.safetensors", "toy", tmp_path / "c.safetensors", None, None)  # type: ignore[arg-type]
    assert read_lora(tmp_path / "c.safetensors").layers == layers()
