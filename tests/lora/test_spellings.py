"""Names and suffixes are separate: every spelling of a layer's name meets every spelling of its suffix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.tables.known import TABLES, format_of, writable

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
PATH, SGM = QUERY.removeprefix("unet."), "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
NAMES = {
    "kohya": (f"lora_unet_{PATH.replace('.', '_')}", QUERY),
    "kohya, original": (f"lora_unet_{SGM.replace('.', '_')}", QUERY),
    "lycoris": (f"lycoris_{PATH.replace('.', '_')}", QUERY),
    "kohya's text": (f"lora_te_{TEXT.partition('.')[2].replace('.', '_')}", TEXT),
    "kohya's text of SDXL": (f"lora_te1_{TEXT.partition('.')[2].replace('.', '_')}", TEXT),
    "diffusers": (QUERY, QUERY),
    "diffusers' text": (TEXT, TEXT),
    "transformers 5": (TEXT.replace("text_model.", ""), TEXT),
    "one network": (PATH, QUERY),
    "one network, original": (SGM, QUERY),
    "ComfyUI": (f"diffusion_model.{SGM}", QUERY),
    "ComfyUI, diffusers": (f"diffusion_model.{PATH}", QUERY),
    "ComfyUI's text": (f"text_encoders.clip_l.transformer.{TEXT.partition('.')[2]}", TEXT),
    "old": (f"{PATH.removesuffix('.to_k')}.processor.to_k", QUERY),
    "old, with a component": (f"{QUERY.removesuffix('.to_k')}.processor.to_k", QUERY),
    "old text": (f"{TEXT.removesuffix('.q_proj')}.to_q", TEXT),
    "early text": (f"{TEXT}.to_q", TEXT),
    "adapter": (f"base_model.model.{PATH}", QUERY),
}
PAIRS = [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
]
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
SHAPES = {QUERY: (640, 768), TEXT: (768, 768)}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, LowRank]:
    save_file(tensors, path / "adapter_model.safetensors", metadata)
    (path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    return dict(read_lora(path / "adapter_model.safetensors").layers)


@pytest.mark.parametrize("ends", PAIRS, ids=[pair[0] for pair in PAIRS])
@pytest.mark.parametrize("spelling", NAMES)
def test_every_name_with_every_suffix(tmp_path: Path, spelling: str, ends: tuple[str, str]) -> None:
    raw, name = NAMES[spelling]
    out, inner = SHAPES[name]
    down, up = rand(2, inner), rand(out, 2)
    pair = {raw + ends[0]: down, raw + ends[1]: up}
    alpha = {raw + ("_lora.alpha" if ends[0].startswith("_") else ".alpha"): torch.tensor(3.0)}
    assert read(tmp_path, pair) == {name: LoRALayer(down, up, 2.0)}
    assert read(tmp_path, pair | alpha) == {name: LoRALayer(down, up, 3.0)}
    for end in MAGNITUDES:
        m = rand(out).abs()
        assert read(tmp_path, pair | {raw + end: m}) == {name: LoRALayer(down, up, 2.0, magnitude=m[:, None])}
    dora = {raw + ".dora_scale": rand(1, inner)}
    assert read(tmp_path, pair | dora) == {name: LoRALayer(down, up, 2.0, magnitude=rand(1, inner))}


@pytest.mark.parametrize("spelling", NAMES)
def test_every_name_with_every_kind(tmp_path: Path, spelling: str) -> None:
    raw, name = NAMES[spelling]
    out, inner = SHAPES[name]
    loha: dict[str, Any] = {f"w{i}_a": rand(out, 2, seed=i) for i in (1, 2)}
    loha |= {f"w{i}_b": rand(2, inner, seed=i) for i in (1, 2)}
    lokr = {"w1": rand(4, 4), "w2_a": rand(out // 4, 2), "w2_b": rand(2, inner // 4)}
    for kind, held in ((LoHaLayer, loha), (LoKrLayer, lokr)):
        tensors = {f"{raw}.{kind.suffixes[field]}": value for field, value in held.items()}
        assert read(tmp_path, tensors | {f"{raw}.alpha": torch.tensor(1.0)}) == {name: kind(**held, alpha=1.0)}


def test_a_format_says_whose_name_and_whose_suffix() -> None:
    name = "lora_unet_conv_in"
    assert format_of(f"{name}.lora_down.weight") == "kohya"
    assert format_of(f"{name}.lora_A.weight") == "kohya with peft adapter's suffixes"
    assert format_of("diffusion_model.conv_in.lora_up.weight") == "ComfyUI"
    assert format_of("conv_in.lora_A.weight") == "bare names"
    assert format_of(f"{QUERY}.hada_w1_a") == "peft with LyCORIS's suffixes"
    assert format_of(f"{name}.alpha") is None


def test_a_dot_in_kohyas_name_is_an_underscore(tmp_path: Path) -> None:
    """As diffusers' scripts write a DoRA for A1111."""
    raw, down, up = f"lora_unet_{PATH.replace('.', '_')}", rand(2, 768), rand(640, 2)
    tensors = {f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up, f"{raw}.alpha": torch.tensor(2)}
    m = rand(640).abs()
    found = read(tmp_path, tensors | {f"{raw.replace('_to_k', '.to_k')}.lora_magnitude_vector": m})
    assert found == {QUERY: LoRALayer(down, up, 2.0, magnitude=m[:, None])}


def test_the_metadata_of_one_network_name_no_component(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 1, "target_modules": ["to_k"], "alpha_pattern": {}, "use_rslora": False}
    pair = {f"{PATH}.lora_A.weight": rand(2, 768), f"{PATH}.lora_B.weight": rand(640, 2)}
    found = read(tmp_path, pair, {"lora_adapter_metadata": json.dumps(config)})
    assert found == {QUERY: LoRALayer(rand(2, 768), rand(640, 2), 1.0)}


# There and back, over formats, kinds, ranks, alphas and dtypes.

PLACES = [QUERY, QUERY.replace("to_k", "to_v"), "unet.conv_in", TEXT, TEXT.replace("q_proj", "out_proj")]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def a_layer(draw: Any, kind: str, dtype: torch.dtype, alpha: float) -> LowRank:
    r, out, inner = (draw(st.integers(1, 4)) for _ in range(3))

    def some(*shape: int) -> Tensor:
        return rand(*shape, seed=draw(st.integers(0, 99))).to(dtype)

    if kind == "LoHa":
        return LoHaLayer(some(out, r), some(r, inner), some(out, r), some(r, inner), alpha)
    if kind == "LoKr":
        return LoKrLayer(alpha, w1=some(2, 3), w2_a=some(out, r), w2_b=some(r, inner))
    magnitude = some(out, 1) if kind == "DoRA" else None
    return LoRALayer(some(r, inner), some(out, r), alpha, magnitude=magnitude)


@QUICK
@given(st.data())
def test_what_is_written_is_read(tmp_path: Path, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(writable()))
    kind = data.draw(st.sampled_from(["LoRA", "DoRA"] if format == "peft" else ["LoRA", "DoRA", "LoHa", "LoKr"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    alphas = st.sampled_from([0.5, 1.0, 3.0, 8.0, -2.0, 0.1])
    shared = data.draw(alphas)  # kohya's plain layers are given one alpha
    names = {*data.draw(st.lists(st.sampled_from(PLACES), min_size=1, unique=True)), PLACES[-1]}
    layers = {
        name: data.draw(a_layer(kind, dtype, shared if format == "kohya" else data.draw(alphas)))
        for name in sorted(names)
    }
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers), format)
    assert read_lora(tmp_path / "a.safetensors").layers == layers


def test_every_table_has_its_own_name() -> None:
    assert all(name == table.name for name, table in TABLES.items())
    assert writable() == ["kohya", "peft"]
