"""Norms of B A by block, against B A itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.families.blocks import block_of
from loratune.lora.inject import LoRA, adapted_layers
from loratune.lora.norms import norms_by_block
from loratune.training.lora_module import LoRAModule


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q", "down.1"),
        ("unet.mid_block.attentions.0.proj_in", "mid"),
        ("unet.conv_in", "unet"),
        ("unet.time_embedding.linear_1", "unet"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "te1"),
        ("text_encoder_2.text_projection", "te2"),
    ],
)
def test_layers_belong_to_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("settings", [{"targets": "all"}, {"type": "loha"}, {"type": "lokr"}, {"alpha": 8.0}])
def test_norms_are_those_of_what_is_added(tiny_base: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LoRAModule(str(tiny_base), LoRA(**{"rank": 2, "text_encoder": True, **settings}))
    for parameter in module.trained_parameters():
        torch.nn.init.normal_(parameter)
    squares: dict[str, float] = {}
    for component, part in module.model.components().items():
        for name, layer in adapted_layers(part).items():
            block = block_of(f"{component}.{name}")
            added: Any = layer.get_delta_weight("default")
            squares[block] = squares.get(block, 0.0) + float(added.detach().double().square().sum())
    found = norms_by_block(module.layers())
    assert found.keys() == squares.keys()
    assert len(found) > 3
    for block, square in squares.items():
        assert found[block] == pytest.approx(square**0.5, rel=1e-4)


def test_b_a_is_never_formed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LoRAModule(str(tiny_base), LoRA(rank=2))
    layers = module.layers()
    made: list[int] = []
    product = torch.Tensor.__matmul__

    def watched(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        result = product(one, other)
        made.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    norms_by_block(layers)
    assert max(made) == 4  # r x r
