"""A kind of adapter that adds itself by one row is injected, trained, collected, written, read and merged.

Delta W = (alpha / r) diag(d) B A: LoRA with a factor for each output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.formats.files import dtype_name
from loratune.lora.algebra import factors as product_of
from loratune.lora.file import LoRAFile, read_layers, read_lora, write_lora
from loratune.lora.inject import LoRA, adapted_layers, collect, factors, inject, is_adapter, put
from loratune.lora.kinds.known import KINDS
from loratune.lora.kinds.layer import Array, LowRank, Product, Rows, need, wide
from loratune.lora.merge.arithmetic import merged
from loratune.lora.verify import verify

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


@dataclass(frozen=True, eq=False)
class Toy(LowRank):
    """diag(d) B A."""

    kind = "Toy"
    makers = {"toy": ("toy.module", None)}  # noqa: RUF012
    suffixes = {"a": "toy_a", "b": "toy_b", "d": "toy_d"}  # noqa: RUF012
    attributes = suffixes
    a: Array
    b: Array
    d: Array
    alpha: float
    magnitude: Array | None = None

    def __post_init__(self) -> None:
        need(self.a.shape[0] == self.b.shape[1] and self.d.shape == self.b.shape[:1], "the sizes do not fit")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def flat_shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def factors(self, dtype: Any) -> Product:
        return Product(self.scale * wide(self.d, dtype)[:, None] * wide(self.b, dtype), wide(self.a, dtype))

    def rows(self, dtype: Any) -> Rows:
        b, a = self.factors(dtype)
        return lambda rows: b[rows] @ a

    @staticmethod
    def peft_config(lora: Any, shared: Mapping[str, Any]) -> Any:
        """What `inject_adapter_in_model` is given; here it is this test's own."""
        return SimpleNamespace(alpha=lora.scaled_alpha, **shared)


class ToyLinear(nn.Module):
    """A Linear with the adapter, as peft would make it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer, self.r, self.scaling = base.requires_grad_(False), {"default": rank}, {"default": alpha / rank}
        self.toy_a = nn.ParameterDict({"default": torch.randn(rank, base.in_features)})
        self.toy_b = nn.ParameterDict({"default": torch.zeros(base.out_features, rank)})
        self.toy_d = nn.ParameterDict({"default": torch.ones(base.out_features)})

    def forward(self, x: Tensor) -> Tensor:
        a, b, d = (part["default"] for part in (self.toy_a, self.toy_b, self.toy_d))
        return self.base_layer(x) + self.scaling["default"] * d * (x @ a.T @ b.T)


def inject_toy(config: Any, module: nn.Module, adapter_name: str) -> None:
    for name in config.target_modules:
        parent, _, last = name.rpartition(".")
        made = ToyLinear(module.get_submodule(name), config.r, config.alpha)
        setattr(module.get_submodule(parent), last, made)


class Net(nn.Module):
    """One layer, under a name that files have."""

    def __init__(self) -> None:
        super().__init__()
        module: nn.Module = nn.Linear(640, 1280)
        for part in reversed(QUERY.split(".")[1:]):
            holder = nn.Module()
            setattr(holder, part, module)
            module = holder
        self.add_module("mid_block", module.get_submodule("mid_block"))

    @property
    def layer(self) -> Any:
        return self.get_submodule(QUERY.removeprefix("unet."))


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, Toy.kind, Toy)
    monkeypatch.setattr("loratune.lora.inject.inject_adapter_in_model", inject_toy)
    monkeypatch.setattr("loratune.lora.inject.BaseTunerLayer", ToyLinear)


def trained() -> tuple[Net, Tensor]:
    """A network with the adapter after one step, and its W_0."""
    torch.manual_seed(0)
    net = Net()
    w = net.layer.weight.detach().clone()
    settings: Any = {"type": "toy", "rank": 3, "alpha": 6.0, "targets": ".*to_q"}
    inject(net, LoRA(**settings), ".*to_q")
    trainable = [value for name, value in net.named_parameters() if is_adapter(name)]
    assert len(trainable) == 3
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    x, target = torch.randn(8, 640), torch.randn(8, 1280)
    for _ in range(2):  # d has no gradient while B is zero
        optimizer.zero_grad()
        (net.layer(x) - target).square().mean().backward()
        optimizer.step()
    assert all(bool(value.any()) for value in factors(net.layer).values())
    return net, w


def test_it_is_injected_trained_collected_written_read_and_merged(tmp_path: Path) -> None:
    net, w = trained()
    layers = collect({"unet": net})
    assert [(type(layer), layer.rank, layer.scale) for layer in layers.values()] == [(Toy, 3, 2.0)]
    path = tmp_path / "a.safetensors"
    write_lora(path, LoRAFile(layers), "kohya")
    assert read_lora(path).layers == layers
    verify(path, layers, "kohya", torch.float32)

    new = w.clone()
    raw = new.view(-1).view(torch.uint8).numpy()
    merged(raw, dtype_name(w.dtype), w.shape, [(1.0, read_layers(path).layers[QUERY])])
    x = torch.randn(4, 640)
    with torch.no_grad():
        wanted = net.layer(x)
        found = nn.functional.linear(x, new, net.layer.base_layer.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(new, w)


def test_it_goes_on_from_its_file() -> None:
    net, _ = trained()
    layers = collect({"unet": net})
    other, _ = trained()
    with torch.no_grad():
        for value in factors(other.layer).values():
            value.zero_()
    put({"unet": other}, layers, Path("a.safetensors"))
    assert collect({"unet": other}) == layers
    assert len(adapted_layers(other)) == 1


def test_it_has_factors_of_low_rank() -> None:
    layer = collect({"unet": trained()[0]})[QUERY]
    b, a = product_of(layer)
    torch.testing.assert_close(b @ a, layer.matrix(torch.float64))
