"""`FILE:SCALE,block=ratio` is understood, and which layers a ratio is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratune.errors import UserError
from loratune.families.architectures import architectures, module_names
from loratune.families.blocks import block_of, short_name, within
from loratune.lora.merge.request import Given, check_blocks, parse

DOWN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.3.resnets.1.conv1"
MID = "unet.mid_block.attentions.0.proj_in"
TIME = "unet.time_embedding.linear_1"
TEXT = "text_encoder.text_model.encoder.layers.3.mlp.fc1"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", Given(Path("a.safetensors"))),
        ("a.safetensors:0.8", Given(Path("a.safetensors"), 0.8)),
        ("a.safetensors:-1e-2", Given(Path("a.safetensors"), -0.01)),
        ("a.safetensors:0.8,down=1,mid=0.5,up.3=0,te=.2",
         Given(Path("a.safetensors"), 0.8, {"down": 1, "mid": 0.5, "up.3": 0, "te": 0.2})),
        ("a.safetensors,te1=0", Given(Path("a.safetensors"), 1.0, {"te1": 0})),
        ("a,b.safetensors:2", Given(Path("a,b.safetensors"), 2.0)),
        ("C:x/a.safetensors:1,down.1.attentions.0=-1",
         Given(Path("C:x/a.safetensors"), 1.0, {"down.1.attentions.0": -1})),
    ],
)  # fmt: skip
def test_what_is_given(text: str, wanted: Given) -> None:
    assert parse(text) == wanted


def test_a_name_that_is_there_counts_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5.safetensors", "b,down=1.safetensors"):
        Path(name).touch()
        assert parse(name) == Given(Path(name))
        assert parse(f"{name}:2,te=1") == Given(Path(name), 2.0, {"te": 1})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a.safetensors:big", "'big' is no number; write FILE:SCALE, such as a.safetensors:0.8"),
        ("a.safetensors:1,down=x", "'x' is no number; write BLOCK=RATIO, such as down=0.5"),
        ("a.safetensors:1,down=", "'' is no number"),
        ("a.safetensors:nan", "the weight must be finite"),
        ("a.safetensors:1,te=inf", "the weight must be finite"),
        ("a.safetensors:1,te=1,te=2", "the block te is there twice; give it once"),
    ],
)
def test_what_is_no_weight_is_told(text: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--lora {text}: {told}")):
        parse(text)


@pytest.mark.parametrize(
    ("blocks", "weights"),
    [
        ({}, (2, 2, 2, 2, 2, 2)),
        ({"unet": 0.5}, (1, 1, 1, 1, 2, 2)),
        ({"down": 0.5}, (1, 2, 2, 2, 2, 2)),
        ({"down.1": 0.5}, (1, 2, 2, 2, 2, 2)),
        ({"down.0": 0.5}, (2, 2, 2, 2, 2, 2)),
        ({"up.3.resnets": 3}, (2, 6, 2, 2, 2, 2)),
        ({"mid": 0}, (2, 2, 0, 2, 2, 2)),
        ({"te": 0}, (2, 2, 2, 2, 0, 0)),
        ({"te1": 0}, (2, 2, 2, 2, 0, 2)),
        ({"te2": -1}, (2, 2, 2, 2, 2, -2)),
        ({"unet": 0, "down": 1, "down.1.attentions.0": 3}, (6, 0, 0, 0, 2, 2)),  # the longest counts
        ({"te": 0, "te2": 1}, (2, 2, 2, 2, 0, 2)),
        ({"down.1.attentions.0.transformer_blocks.0.attn1.to_q": 0.25}, (0.5, 2, 2, 2, 2, 2)),
    ],
)
def test_the_weight_of_a_layer(blocks: dict[str, float], weights: tuple[float, ...]) -> None:
    given = Given(Path("a"), 2.0, blocks)
    assert tuple(given.weight_of(name) for name in (DOWN, UP, MID, TIME, TEXT, TEXT_2)) == weights


def test_blocks_are_called_by_short_names() -> None:
    assert [block_of(name) for name in (DOWN, UP, MID, TIME, TEXT, TEXT_2)] == [
        "down.1", "up.3", "mid", "unet", "te1", "te2",
    ]  # fmt: skip
    assert short_name(DOWN) == "down.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert not within("unet.down_blocks.10.x.y", "down.1")


def test_a_block_that_the_base_lacks_is_told() -> None:
    names = module_names(architectures()["sd15"])
    check_blocks(Given(Path("a"), 1.0, {"te": 1, "up.3.attentions": 1}), names)
    for block in ("te2", "down.9", "middle", "IN01"):
        with pytest.raises(UserError, match=rf"--lora a: the base has no block '{block}'; there are te, .*up\.3"):
            check_blocks(Given(Path("a"), 1.0, {block: 1}), names)
