"""Plain LoRA files read without torch are what `read_lora` reads; of all others it has nothing to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratune.formats.files import write_safetensors
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.layers import LoRALayer
from loratune.lora.plain import read_plain

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def layers(dtype: torch.dtype = torch.float32) -> dict[str, LoRALayer]:
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    return {
        f"{BLOCK}.to_q": LoRALayer(some(4, 320), some(320, 4), 2.0),
        f"{BLOCK}.to_v": LoRALayer(some(2, 768), some(320, 2), 3.0),
        CONV: LoRALayer(some(3, 320, 3, 3), some(320, 3, 1, 1), 3.0),
        f"{TEXT}.v_proj": LoRALayer(some(4, 768), some(768, 4), 1.0),
    }


def kohya(path: Path, *changes: tuple[str, Any]) -> Path:
    """A kohya file of two layers, one with a Tucker-decomposed convolution, with tensors changed or added."""
    random = torch.Generator().manual_seed(1)
    query, conv = (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q",
        "lora_unet_mid_block_resnets_0_conv1",
    )
    tensors = {
        f"{query}.lora_down.weight": torch.randn(4, 320, generator=random).half(),
        f"{query}.lora_up.weight": torch.randn(320, 4, generator=random).half(),
        f"{query}.alpha": torch.tensor(2.0).bfloat16(),
        f"{conv}.lora_down.weight": torch.randn(2, 1280, 1, 1, generator=random),
        f"{conv}.lora_mid.weight": torch.randn(2, 2, 3, 3, generator=random),
        f"{conv}.lora_up.weight": torch.randn(1280, 2, 1, 1, generator=random),
    }
    tensors |= {f"{query}{key}": value for key, value in changes}
    write_safetensors(path, {key: value for key, value in tensors.items() if value is not None}, {})
    return path


def assert_same(path: Path) -> None:
    plain, whole = read_plain(path), read_lora(path)
    assert plain is not None
    assert plain.layers.keys() == whole.layers.keys()
    for name, layer in plain.layers.items():
        wanted = whole.layers[name]
        assert (layer.alpha, layer.rank, layer.flat_shape) == (wanted.alpha, wanted.rank, wanted.flat_shape)
        for kind in (np.float32, np.float64):
            b, a = layer.factors(kind)
            assert b.dtype == a.dtype == kind
            matrix = wanted.matrix(torch.float32 if kind == np.float32 else torch.float64)
            assert np.allclose(b @ a, matrix.numpy(), rtol=1e-5 if kind == np.float32 else 1e-13, atol=1e-6)


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_files(tmp_path: Path, format: Any, dtype: torch.dtype) -> None:
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers()), format, dtype)
    assert_same(tmp_path / "a.safetensors")
    assert_same(kohya(tmp_path / "b.safetensors"))


def test_zeros_that_were_put_in_are_left_out(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers()), "kohya", torch.float32)
    plain = read_plain(tmp_path / "a.safetensors")
    assert plain is not None
    assert set(plain.layers) == set(layers())  # diffusers wants q and k beside v


DAMAGED: dict[str, list[tuple[str, Any]]] = {
    "not finite": [(".lora_up.weight", torch.full((320, 4), torch.inf))],
    "NaN in bfloat16": [(".lora_up.weight", torch.full((320, 4), torch.nan).bfloat16())],
    "DoRA": [(".dora_scale", torch.ones(320, 1))],
    "ranks": [(".lora_up.weight", torch.ones(320, 3))],
    "half": [(".lora_up.weight", None)],
    "alpha": [(".alpha", torch.ones(3))],
    "integers": [(".lora_down.weight", torch.ones(4, 320, dtype=torch.int8))],
    "no layer": [(".what", torch.ones(2))],
    "LoHa": [
        (".lora_down.weight", None),
        (".lora_up.weight", None),
        *((f".hada_w{side}_a", torch.ones(320, 2)) for side in (1, 2)),
        *((f".hada_w{side}_b", torch.ones(2, 320)) for side in (1, 2)),
    ],
}


@pytest.mark.parametrize("what", DAMAGED)
def test_of_all_others_there_is_none(tmp_path: Path, what: str) -> None:
    assert read_plain(kohya(tmp_path / "a.safetensors", *DAMAGED[what])) is None


def test_it_loads_no_torch() -> None:
    code = "import sys, loratune.formats.lora_plain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
