"""B and A sit beside the layers that were asked for and compute what the formula says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratune.errors import UserError
from loratune.families.architectures import canonical_module_name
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.families.sd import StableDiffusion
from loratune.lora.inject import (
    PRESETS,
    LoRA,
    adapted_layers,
    collect,
    inject,
    match_targets,
    parameter_groups,
    switch,
)

QUICK = settings(max_examples=60, deadline=None)


TARGETS = {**PRESETS, **StableDiffusion.targets}


@pytest.fixture
def family(tiny_base: Path) -> Model:
    return load_model(str(tiny_base)).eval()


class Little(nn.Module):
    """A block with the names of a transformer block's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.Module()
        for name in ("to_q", "to_k", "to_v"):
            self.attn2.add_module(name, nn.Linear(6, 5))
        self.attn2.add_module("to_out", nn.ModuleList([nn.Linear(5, 6), nn.Dropout(0.0)]))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.LayerNorm(6)


def blocks(family: Model, name: str) -> list[str]:
    return [path for path, _ in family.network.named_modules() if path.endswith(f".{name}")]


# Targets.


def test_presets_match_what_they_say(family: Model) -> None:
    network = family.network
    crossing, own, forward = (blocks(family, name) for name in ("attn2", "attn1", "ff"))
    assert len(crossing) == len(own) == len(forward) > 0
    cross = {f"{block}.to_{part}" for block in crossing for part in "qkv"}
    assert set(match_targets(network, TARGETS["cross-attention"])) == cross
    attention = {f"{block}.to_{part}" for block in crossing + own for part in ("q", "k", "v", "out.0")}
    assert set(match_targets(network, TARGETS["attention"])) == attention
    feed = {f"{block}.{part}" for block in forward for part in ("net.0.proj", "net.2")}
    assert set(match_targets(network, TARGETS["attention+ff"])) == attention | feed
    linear = {name for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    assert set(match_targets(network, PRESETS["all-linear"], linear_only=True)) == linear
    assert LoRA(targets="all-linear").linear_only
    convolutions = {name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)}
    assert set(match_targets(network, PRESETS["all"])) == linear | convolutions
    assert attention | feed < linear


def test_the_default_adapts_three_layers_of_each_cross_attention(family: Model) -> None:
    targets = inject(family.network, LoRA(), LoRA().pattern(TARGETS))
    assert len(targets) == 3 * len(blocks(family, "attn2"))
    assert sorted(adapted_layers(family.network)) == sorted(targets)
    assert all(re.search(r"\.attn2\.to_[qkv]$", name) for name in targets)


def test_text_targets_are_the_text_encoders_attention(family: Model) -> None:
    targets = match_targets(family.text_encoder, StableDiffusion.text_targets)
    assert sorted(canonical_module_name("text_encoder", family.text_encoder, name) for name in targets) == [
        f"text_model.encoder.layers.0.self_attn.{part}_proj" for part in ("k", "out", "q", "v")
    ]
    assert canonical_module_name("text_encoder", family.text_encoder, "text_model.x") == "text_model.x"
    assert canonical_module_name("unet", family.network, "down_blocks.0") == "down_blocks.0"


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (r"attn2\.to_q", ["attn2.to_q"]),
        (r".*", ["attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v", "conv"]),
        ("all-linear", ["attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v"]),
        (r"conv", ["conv"]),
        (r"(conv|.*\.to_v)", ["attn2.to_v", "conv"]),
    ],
)
def test_targets_are_regular_expressions_of_whole_names(pattern: str, wanted: list[str]) -> None:
    targets = inject(Little(), LoRA(rank=2, targets=pattern), LoRA(rank=2, targets=pattern).pattern(TARGETS))
    assert sorted(targets) == wanted


def test_only_the_layers_that_match_whole_are_adapted() -> None:
    model = nn.ModuleDict({"a": Little(), "b": Little()})
    inject(model, LoRA(rank=2), r"a\.conv")
    assert list(adapted_layers(model)) == ["a.conv"]
    with pytest.raises(UserError):
        match_targets(model, r"\.conv")


def test_targets_that_match_nothing_list_what_there_is(family: Model) -> None:
    with pytest.raises(UserError, match=r"lora\.targets '.*attn3.*' matches no layer; there are: ") as error:
        inject(family.network, LoRA(), r".*attn3.*")
    told = str(error.value)
    assert "down_blocks.N.attentions.N.transformer_blocks.N.attn2.to_q" in told
    assert "time_embedding.linear_1" in told
    assert not re.search(r"down_blocks\.\d", told)
    assert not adapted_layers(family.network)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", 0), ("rank", -3), ("alpha", 0.0), ("alpha", -1.0), ("dropout", 1.0), ("dropout", -0.1),
     ("alpha", float("nan")), ("alpha", float("inf")), ("dropout", float("nan"))],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"lora\.{key} is {value}; give"):
        LoRA(**{key: value})  # type: ignore[arg-type]


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.targets '\(attn' is no preset and no regular expression: "):
        LoRA(targets="(attn")


# The formula.


def filled(layer: nn.Module, lora: LoRA, seed: int = 0) -> dict[str, Tensor]:
    """Inject into {layer} and fill B; A, B and W_0 by name."""
    torch.manual_seed(seed)
    holder = nn.ModuleDict({"layer": layer})
    inject(holder, lora, "layer")
    part = adapted_layers(holder)["layer"]
    nn.init.normal_(part.lora_B["default"].weight)
    a, b = part.lora_A["default"].weight.detach(), part.lora_B["default"].weight.detach()
    return {"holder": holder, "a": a, "b": b, "w": layer.weight.detach(), "bias": layer.bias.detach()}  # type: ignore[dict-item]


@QUICK
@given(st.integers(1, 9), st.one_of(st.none(), st.floats(0.1, 40)), st.integers(0, 1000))
def test_a_linear_layer_computes_the_formula(rank: int, alpha: float | None, seed: int) -> None:
    parts = filled(nn.Linear(7, 5).double(), LoRA(rank=rank, alpha=alpha), seed)
    a, b = parts["a"].double(), parts["b"].double()
    assert (a.shape, b.shape) == ((rank, 7), (5, rank))
    x = torch.randn(3, 7, dtype=torch.float64)
    scale = 1.0 if alpha is None else alpha / rank
    wanted = x @ parts["w"].T + parts["bias"] + scale * (x @ a.T) @ b.T
    got = parts["holder"].eval()["layer"](x)  # type: ignore[attr-defined]
    assert torch.allclose(got, wanted, atol=1e-4 if a.dtype != parts["a"].dtype else 1e-9)


def test_a_convolution_computes_the_formula() -> None:
    parts = filled(nn.Conv2d(3, 4, 3, padding=1), LoRA(rank=2, alpha=6))
    x = torch.randn(2, 3, 5, 5)
    delta = 3.0 * torch.einsum("or,rikl->oikl", parts["b"][:, :, 0, 0], parts["a"])
    wanted = nn.functional.conv2d(x, parts["w"] + delta, parts["bias"], padding=1)
    assert torch.allclose(parts["holder"].eval()["layer"](x), wanted, atol=1e-5)  # type: ignore[attr-defined]
    layer = collect({"unet": parts["holder"]})["unet.layer"]  # type: ignore[dict-item]
    assert torch.allclose(layer.matrix().view_as(delta), delta, atol=1e-6)


def test_a_layer_within_the_network_computes_the_formula(family: Model) -> None:
    lora = LoRA(rank=3, alpha=7.5)
    targets = inject(family.network, lora, lora.pattern(TARGETS))
    layer = adapted_layers(family.network)[targets[4]]
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))  # B = 0
        nn.init.normal_(layer.lora_B["default"].weight)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        wanted = layer.base_layer(x) + 7.5 / 3 * (x @ a.T) @ b.T
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        switch([family.network], 0.4)
        assert torch.allclose(layer(x), layer.base_layer(x) + 0.4 * (wanted - layer.base_layer(x)), atol=1e-5)
        switch([family.network], None)
        assert torch.allclose(layer(x), layer.base_layer(x) + 0.4 * (wanted - layer.base_layer(x)), atol=1e-5)
        switch([family.network], 0.0)
        assert torch.equal(layer(x), layer.base_layer(x))
        switch([family.network], 1.0)
        assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_alpha_is_the_rank_unless_given() -> None:
    assert LoRA(rank=5).scaled_alpha == 5.0
    assert LoRA(rank=5, alpha=2).scaled_alpha == 2.0
    for lora in (LoRA(rank=5, targets="conv"), LoRA(rank=5, alpha=2, targets="conv")):
        model = Little()
        inject(model, lora, lora.pattern(TARGETS))
        layer = collect({"unet": model})["unet.conv"]
        assert (layer.rank, layer.alpha) == (5, lora.scaled_alpha)


def test_dropout_is_for_training_alone() -> None:
    parts = filled(nn.Linear(64, 5), LoRA(rank=4, dropout=0.5))
    holder, x = parts["holder"], torch.randn(3, 64)
    wanted = x @ parts["w"].T + parts["bias"] + (x @ parts["a"].T) @ parts["b"].T
    holder.eval()  # type: ignore[attr-defined]
    assert torch.allclose(holder["layer"](x), wanted, atol=1e-4)
    holder.train()  # type: ignore[attr-defined]
    one, two = holder["layer"](x), holder["layer"](x)
    assert not torch.allclose(one, two, atol=1e-2)
    many = torch.stack([holder["layer"](x) for _ in range(2000)])  # its mean is what there is without dropout:
    error = (many.mean(0) - wanted).abs() / (many.std(0) / 2000**0.5)
    assert error.max() < 5  # deviations of the mean, 15 numbers: by chance less than 1e-5


# In and out.


def test_only_the_adapter_is_trained(family: Model) -> None:
    family.requires_grad_(False)
    inject(family.network, LoRA(rank=2), LoRA().pattern(TARGETS))
    inject(family.text_encoder, LoRA(rank=2), StableDiffusion.text_targets)
    groups = parameter_groups(family.components(), LoRA(text_encoder=True, text_encoder_lr=5e-5), ["text_encoder"])
    assert [group.get("lr") for group in groups] == [None, 5e-5]
    assert [len(group["params"]) for group in groups] == [2 * 3 * len(blocks(family, "attn2")), 2 * 4]


def test_what_is_collected_is_a_copy_under_the_names_of_files(family: Model) -> None:
    lora = LoRA(rank=2, alpha=3)
    targets = inject(family.network, lora, lora.pattern(TARGETS))
    inject(family.text_encoder, lora, StableDiffusion.text_targets)
    found = collect(family.components())
    assert set(found) == {f"unet.{name}" for name in targets} | {
        f"text_encoder.text_model.encoder.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")
    }
    layer = adapted_layers(family.network)[targets[0]]
    before = found[f"unet.{targets[0]}"].down.clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1)
    assert torch.equal(found[f"unet.{targets[0]}"].down, before)
    assert {one.alpha for one in found.values()} == {3.0}
    assert {one.down.dtype for one in found.values()} == {torch.float32}
