"""Cross-attention is recorded as it is, and the network is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.evaluation.attention import Maps, recorded, shares
from loratune.families.load import load_model
from loratune.families.prompts import words_of
from loratune.training.memory import attend_plainly

X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([600, 600])


def look(family: Any, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return family.denoise(X, T, family.encode_prompts(prompts))


@pytest.mark.parametrize("plain", [False, True])
def test_it_is_the_networks_own_attention_and_goes_away(tiny_base: Path, plain: bool) -> None:
    family: Any = load_model(str(tiny_base)).eval()
    if plain:
        attend_plainly(family.network)
    before, processors = look(family, ["a red disc", ""]), dict(family.network.attn_processors)
    with recorded(family.network) as maps:
        assert torch.equal(look(family, ["a red disc", ""]), before)
    assert family.network.attn_processors == processors
    for total in maps.sums.values():
        assert torch.allclose(total.sum(1) / maps.counts[total.shape[0]], torch.ones(total.shape[0]), atol=1e-5)
    assert sorted(maps.sums) == [16, 64]
    tokens = maps.tokens(8)
    assert tokens.shape == (77, 8, 8)
    assert torch.allclose(tokens.sum(0), torch.ones(8, 8), atol=1e-5)
    look(family, ["a red disc", ""])
    assert torch.equal(maps.tokens(8), tokens)  # nothing is recorded any more


def test_processors_come_back_after_an_error(tiny_base: Path) -> None:
    family: Any = load_model(str(tiny_base)).eval()
    processors = dict(family.network.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), recorded(family.network):
        raise RuntimeError("stop")
    assert family.network.attn_processors == processors


def test_only_the_rows_with_the_prompt_count(tiny_base: Path) -> None:
    family: Any = load_model(str(tiny_base)).eval()
    found = []
    for second in ("", "a long blue ring"):
        with recorded(family.network, rows=1) as maps:
            look(family, ["a red disc", second])
        found.append(maps.tokens(8))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    with recorded(family.network, rows=2) as maps:
        look(family, ["a red disc", "a long blue ring"])
    assert not torch.allclose(maps.tokens(8), found[1], atol=1e-5)


def test_layers_count_by_how_often_they_were_seen() -> None:
    maps = Maps()
    for value in (1.0, 3.0):
        maps.add(torch.full((1, 2, 4, 3), value))
    maps.add(torch.full((1, 2, 16, 3), 8.0))
    assert torch.allclose(maps.tokens(4), torch.full((3, 4, 4), (1 + 3 + 8) / 3))


def test_tokens_make_words() -> None:
    pieces = ["a</w>", "water", "colour</w>", "disc</w>", ",</w>", "half"]
    assert words_of(pieces) == [("a", [0]), ("watercolour", [1, 2]), ("disc", [3]), (",", [4]), ("half", [5])]
    assert words_of([]) == []


def test_words_share_what_is_seen() -> None:
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    found = shares(maps, [("a", [1]), ("watercolour", [2, 3])])
    assert torch.allclose(found.sum(0), torch.ones(4, 4))
    assert torch.allclose(found[1] / found[0], (maps[2] + maps[3]) / maps[1])
