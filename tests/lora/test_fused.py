"""The fused sum W_0 x + s B A x is peft's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from loratune.lora.fused import Fused
from loratune.lora.inject import ADAPTER, LoRA, adapted_layers, inject, switch


class Net(nn.Module):
    """A convolution, a layer on rows of rows and one on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 6, 6) to (B, 5)."""
        made = self.conv(x).flatten(2).transpose(1, 2)
        return self.last(self.inner(made).relu().mean(1))


def pair(dropout: float = 0.0) -> tuple[Net, Net]:
    """The same adapted network, ours and peft's, with B away from 0."""
    torch.manual_seed(0)
    ours, theirs = Net().double(), Net().double()
    theirs.load_state_dict(ours.state_dict())
    lora = LoRA(rank=3, alpha=5, dropout=dropout, targets=".*")
    inject(ours, lora, ".*")
    names = ["conv", "inner", "last"]
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=names), theirs)
    for net in (ours, theirs):
        net.double()
        for name, value in net.named_parameters():
            value.requires_grad_("lora_" in name)
            if "lora_" in name:
                random = torch.Generator().manual_seed(len(name))
                value.data = 0.3 * torch.randn(value.shape, generator=random, dtype=torch.float64)
    return ours, theirs


def through(net: Net, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The output, the gradients of A and B, and that of x."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = net(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, x.grad


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_numbers_and_gradients_are_pefts(dropout: float, weight: float) -> None:
    ours, theirs = pair(dropout)
    assert all(layer.lora_variant == {ADAPTER: Fused} for layer in adapted_layers(ours).values())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for net in (ours, theirs):
        switch([net], weight)
    (out, gradients, of_x), (their_out, their_gradients, their_x) = through(ours, x), through(theirs, x)
    torch.testing.assert_close(out, their_out)
    torch.testing.assert_close(of_x, their_x)
    assert gradients.keys() == their_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, their_gradients[name])


def test_under_autocast_it_is_no_further_from_the_exact_sum_than_peft() -> None:
    ours, theirs = pair()
    x = torch.randn(64, 3, 6, 6, dtype=torch.float64)
    exact = ours(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made, their = (net.float()(x.float()) for net in (ours, theirs))
    assert made.dtype == their.dtype
    assert (made - exact).square().mean() <= 1.1 * (their - exact).square().mean()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_base_in_bfloat16_needs_no_autocast(base: torch.dtype) -> None:
    ours, _ = pair()
    ours.float()
    for part in (ours.conv, ours.inner, ours.last):
        held: Any = part.base_layer
        held.to(base)
    x = torch.randn(4, 3, 6, 6).to(base)
    assert ours(x).dtype == base


def test_dora_stays_pefts() -> None:
    net = Net()
    inject(net, LoRA(rank=3, type="dora", targets=".*"), ".*")
    assert all(layer.lora_variant[ADAPTER] is not Fused for layer in adapted_layers(net).values())
    assert all(layer.cast_input_dtype_enabled for layer in adapted_layers(net).values())
