"""What is not read of a LoRA file: refused by name, left out where that is allowed, and each key named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families.base import Base
from loratune.formats import headers
from loratune.lora.file import read_layers, read_lora

BASE = "builtin:emoji-64"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
RAW = f"lora_unet_{LAYER.replace('.', '_')}"
STRAY = {
    "norms": ("lora_unet_down_blocks_0_attentions_0_norm.w_norm", "trained norms"),
    "a bundled embedding": ("bundle_emb.word.clip_l", "an embedding bundled with a LoRA"),
    "whole weights": ("lora_unet_conv_in.diff", "whole weights"),
    "a key of nothing": ("something.else", "is not part of a kohya LoRA"),
    "a layer of FLUX": ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "a FLUX LoRA"),
    "a layer of nothing": ("lora_unet_new.lora_down.weight", "which is no layer of the architectures known here"),
}


@pytest.fixture(scope="module")
def shape() -> tuple[int, ...]:
    return tuple(Base.open(BASE).layers[f"unet.{LAYER}"].shape)


def pair(shape: tuple[int, ...], raw: str = RAW) -> dict[str, Tensor]:
    return {f"{raw}.lora_down.weight": torch.ones(2, shape[1]), f"{raw}.lora_up.weight": torch.ones(shape[0], 2)}


def merge(lora: Path, out: Path, *words: str) -> int:
    return main(["merge", "--base", BASE, "--lora", str(lora), "--out", str(out), *words])


@pytest.mark.parametrize("what", STRAY)
def test_a_key_that_is_not_read_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...], what: str
) -> None:
    key, reason = STRAY[what]
    other = {key.replace("down", "up"): torch.ones(4, 4)} if "lora_down" in key else {}
    save_file({**pair(shape), key: torch.ones(4, 4), **other}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"{key}' .*{reason}.*--allow-partial leaves it out and takes the other 1 lay"):
        read_lora(tmp_path / "a.safetensors")
    assert merge(tmp_path / "a.safetensors", tmp_path / "out") == 2
    capsys.readouterr()
    assert merge(tmp_path / "a.safetensors", tmp_path / "out", "--allow-partial", "--json") == 0
    (lora,) = json.loads(capsys.readouterr().out)["loras"]
    assert (lora["matched"], list(lora["left out"])) == (1, [key])
    assert reason in lora["left out"][key]


def test_layers_of_another_shape_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    names = [LAYER.replace("to_k", end) for end in ("to_v", "to_q")]
    fitting = {
        key: value
        for end in ("to_k", "to_v")
        for key, value in pair(shape, f"unet.{LAYER.replace('to_k', end)}").items()
    }
    wrong = pair((shape[0] + 1, shape[1]), f"unet.{names[1]}")
    save_file({**fitting, **wrong}, tmp_path / "a.safetensors")
    assert merge(tmp_path / "a.safetensors", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"unet.{names[1]} is [{shape[0] + 1}, {shape[1]}], the base's [" in message
    assert "made for another base" not in message
    assert merge(tmp_path / "a.safetensors", tmp_path / "out", "--allow-partial") == 0
    assert f"left out: unet.{names[1]}, which the base lacks or has in another shape" in capsys.readouterr().out


def test_what_is_damaged_is_never_left_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = pair(shape) | pair(shape, f"unet.{LAYER.replace('to_k', 'to_v')}")
    save_file(dict(list(tensors.items())[:-1]), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="has no up tensor"):
        read_layers(tmp_path / "a.safetensors", partial=True)
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is it a LoRA"):
        read_layers(tmp_path / "a.safetensors", partial=True)


def test_inspect_of_a_refused_file_reads_its_header_a_few_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (3, 60):
        tensors = {k: v for i in range(layers) for k, v in pair((2, 2), f"lora_unet_x_{i}").items()}
        save_file({**tensors, "bundle_emb.a": torch.ones(1)}, tmp_path / "a.safetensors")
        parsed = []
        parse: Any = headers._parse
        monkeypatch.setattr(
            headers, "_parse", lambda *given, parse=parse, parsed=parsed: parsed.append(1) or parse(*given)
        )
        assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
        monkeypatch.undo()
        counts.append(len(parsed))
        assert json.loads(capsys.readouterr().out)["readers"]["loratune"]["loads"] == "refused"
    assert counts[0] == counts[1] < 6


def test_a_control_lora_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lora_controlnet": torch.ones(1),
        "input_hint_block.0.weight": torch.ones(1),
        "time_embed.0.up": torch.ones(1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert "a Control-LoRA" in json.loads(capsys.readouterr().out)["kind"]
    with pytest.raises(UserError, match="a Control-LoRA"):
        read_lora(tmp_path / "a.safetensors")


def test_a_suffix_in_capitals_is_a_suffix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file(pair(shape), tmp_path / "A.SAFETENSORS")
    assert merge(tmp_path / "A.SAFETENSORS", tmp_path / "out") == 0


def test_loha_beside_a_convolution_may_have_four_dimensions(tmp_path: Path) -> None:
    """OneTrainer's files."""
    flat = {f"w{i}_a": torch.randn(320, 2) for i in (1, 2)} | {f"w{i}_b": torch.randn(2, 36) for i in (1, 2)}
    square = {name: value.reshape(320, 2, 1, 1) if name.endswith("a") else value.reshape(2, 4, 3, 3)
              for name, value in flat.items()}  # fmt: skip
    found = []
    for held in (flat, square):
        save_file({f"lora_unet_conv_in.hada_{name}": value for name, value in held.items()}, tmp_path / "a.safetensors")
        found.append(read_lora(tmp_path / "a.safetensors").layers["unet.conv_in"])
    assert found[0].flat_shape == found[1].flat_shape == (320, 36)
    assert torch.equal(found[0].matrix(), found[1].matrix())
