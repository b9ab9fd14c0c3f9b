"""Where a layer's weight lies in a file is where it is: the bytes there are the weight's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base import Base
from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.save import write_single_file
from loratune.families.single_file import to_single_file
from loratune.families.slots import Slot
from loratune.formats.files import DTYPES, read_header, write_safetensors
from loratune.lora.merge.stream import turned

ARCHITECTURES = ("sd15", "sd2", "sdxl", "sd15-inpainting")


def held(slot: Slot, data_section: bytes) -> torch.Tensor:
    """The weight that a slot tells of."""
    data = torch.frombuffer(bytearray(data_section[slot.start : slot.stop]), dtype=torch.uint8)
    if slot.transposed:
        data = torch.from_numpy(turned(data.numpy(), slot.shape[::-1]))
    return data.view(DTYPES[slot.dtype]).reshape(slot.shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_files(
    tiny_configs: Callable[..., Any],
    tiny_weights: Callable[..., Any],
    tmp_path: Path,
    architecture: str,
    dtype: torch.dtype,
) -> None:
    configs = tiny_configs(architecture)
    weights, file = tiny_weights(configs, dtype), tmp_path / "base.safetensors"
    write_single_file(file, configs, weights)
    base = Base.open(str(file))
    slots = base.layers
    assert set(slots) == set(module_names(configs))
    data = file.read_bytes()[read_header(file).data_offset :]
    for name, slot in slots.items():
        part, _, key = name.partition(".")
        wanted = weights[part][f"{key}.weight"]
        assert slot.shape == tuple(wanted.shape)
        assert slot.flat_shape == tuple(wanted.flatten(1).shape)
        assert torch.equal(held(slot, data), wanted), name
        assert torch.equal(base.read(f"{name}.weight"), wanted), name
    # OpenCLIP's q, k and v are one tensor in the file.
    fused = len(slots) - len({slot.key for slot in slots.values()})
    assert fused == {"sd2": 4, "sdxl": 4}.get(architecture, 0)  # two layers, each with one key for three
    assert any(slot.transposed for slot in slots.values()) == (architecture == "sdxl")


def test_folders(tiny_base: Path) -> None:
    from safetensors.torch import load_file

    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = tiny_base / part / f"{name}.safetensors"
        slots = {name: slot for name, slot in Base.open(str(tiny_base)).layers.items() if name.startswith(f"{part}.")}
        tensors = load_file(file)
        layers = {key for key, value in tensors.items() if value.dim() in (2, 4)}
        assert {slot.key for slot in slots.values()} == {key for key in layers if "embedding" not in key.split(".")[-2]}
        data = file.read_bytes()[read_header(file).data_offset :]
        for slot in slots.values():
            assert torch.equal(held(slot, data), tensors[slot.key])
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in slots


@pytest.mark.parametrize("fault", ["is missing", r"has shape \[1, 2\] instead of \[8, 8\]"])
def test_a_checkpoint_that_is_not_whole_is_told(
    tiny_configs: Callable[..., Any], tiny_weights: Callable[..., Any], tmp_path: Path, fault: str
) -> None:
    configs = tiny_configs("sd15")
    file = tmp_path / "base.safetensors"
    tensors = to_single_file(tiny_weights(configs), configs)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    if fault == "is missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(1, 2)
    write_safetensors(file, tensors, {CONFIGS_KEY: json.dumps(configs)})
    with pytest.raises(UserError, match=rf"base\.safetensors: '{key}' {fault}; the checkpoint is not complete"):
        _ = Base.open(str(file)).layers
