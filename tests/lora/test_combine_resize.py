"""Combined and resized LoRAs do what the sums and the nearest matrices do, and say how far they are off."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.cli.main import main
from loratune.formats.headers import read_header
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.lora import LoRALayer

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
Q, K, V = (f"{BLOCK}.attn2.to_{part}" for part in "qkv")
CONV = "unet.down_blocks.0.resnets.0.conv1"
UP = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
SIZES = {Q: (10, 8), K: (10, 12), V: (10, 12), CONV: (9, 6, 3, 3), UP: (7, 7)}


def layer(name: str, rank: int, alpha: float, seed: int, dtype: torch.dtype = torch.float32) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    outer, inner, *kernel = SIZES[name]
    down = torch.randn(rank, inner, *kernel, generator=generator).to(dtype)
    up = torch.randn(outer, rank, *[1] * len(kernel), generator=generator).to(dtype)
    return LoRALayer(down, up, alpha)


def lora(
    path: Path, rank: int, alpha: float, *names: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LoRAFile:
    layers = {name: layer(name, rank, alpha, seed + i, dtype) for i, name in enumerate(names)}
    file = LoRAFile(layers, {"ss_base_model_version": "sd_v1", "ss_steps": str(seed), "sshs_model_hash": "old"})
    write_lora(path, file)
    return file


def matrix(file: LoRAFile, name: str) -> Tensor:
    if name not in file.layers:
        return torch.zeros(SIZES[name][0], math.prod(SIZES[name][1:])).double()
    return file.layers[name].matrix(torch.float64)


def ran(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@QUICK
@given(
    st.lists(st.sampled_from([0.5, 1.0, -1.0, 0.3, -0.75, 2.0]), min_size=2, max_size=2),
    st.sampled_from(["peft", "kohya"]),
)
def test_a_combination_is_the_sum_with_each_weight_once(tmp_path, weights, format):
    one = lora(tmp_path / "one.safetensors", 3, 1.5, Q, K, CONV)
    other = lora(tmp_path / "other.safetensors", 2, 4.0, Q, V, CONV, seed=9)
    out = tmp_path / "out.safetensors"
    given = [f"{tmp_path / name}.safetensors:{w}" for name, w in zip(("one", "other"), weights, strict=True)]
    ran("combine", "--lora", given[0], f"--lora={given[1]}", "--to", format, "--out", out)
    found = read_lora(out)
    assert found.layers.keys() == {Q, K, V, CONV}
    assert {name: part.rank for name, part in found.layers.items()} == {Q: 5, K: 3, V: 2, CONV: 5}
    for name in found.layers:
        wanted = weights[0] * matrix(one, name) + weights[1] * matrix(other, name)
        torch.testing.assert_close(matrix(found, name), wanted, rtol=1e-5, atol=1e-5)


def test_half_a_weight_acts_as_a_half(tmp_path):
    one = lora(tmp_path / "one.safetensors", 3, 1.5, Q)
    ran("combine", "--lora", f"{tmp_path}/one.safetensors:0.5", "--out", tmp_path / "out.safetensors")
    found = read_lora(tmp_path / "out.safetensors").layers[Q]
    assert torch.equal(found.matrix(), 0.5 * one.layers[Q].matrix())
    assert torch.equal(found.down, one.layers[Q].down)


def test_weights_of_blocks_count_too(tmp_path):
    one = lora(tmp_path / "one.safetensors", 3, 3.0, Q, UP)
    other = lora(tmp_path / "other.safetensors", 3, 3.0, Q, seed=5)
    words = ["--lora", f"{tmp_path}/one.safetensors:2,down=0.25,up=0", "--lora", f"{tmp_path}/other.safetensors"]
    ran("combine", *words, "--out", tmp_path / "out.safetensors")
    found = read_lora(tmp_path / "out.safetensors")
    assert found.layers.keys() == {Q}
    torch.testing.assert_close(matrix(found, Q), 0.5 * matrix(one, Q) + matrix(other, Q), rtol=1e-5, atol=1e-5)


def test_at_a_rank_it_is_the_nearest_sum_and_says_how_near(tmp_path, capsys):
    one = lora(tmp_path / "one.safetensors", 3, 1.5, Q, CONV)
    other = lora(tmp_path / "other.safetensors", 4, 4.0, Q, CONV, seed=9)
    out = tmp_path / "out.safetensors"
    words = ["--lora", f"{tmp_path}/one.safetensors:-1", "--lora", f"{tmp_path}/other.safetensors:0.5"]
    ran("combine", *words, "--rank", 2, "--out", out)
    found = read_lora(out)
    tails, wholes = [], []
    for name in (Q, CONV):
        wanted = 0.5 * matrix(other, name) - matrix(one, name)
        s = torch.linalg.svdvals(wanted)
        tails.append(float(s[2:].norm()))
        wholes.append(float(s.norm()))
        assert found.layers[name].rank == 2
        assert float((wanted - matrix(found, name)).norm()) == pytest.approx(tails[-1], rel=1e-5)
    told = json.loads(found.metadata["loratune.combined"])
    assert told["error"] == pytest.approx(math.hypot(*tails) / math.hypot(*wholes), rel=1e-5)
    assert f"relative Frobenius error {told['error']:.2e}" in capsys.readouterr().out


def test_what_was_combined_is_noted_and_what_all_agree_on_is_kept(tmp_path):
    lora(tmp_path / "one.safetensors", 3, 1.5, Q)
    lora(tmp_path / "other.safetensors", 3, 1.5, Q, seed=7)
    words = ["--lora", f"{tmp_path}/one.safetensors", "--lora", f"{tmp_path}/other.safetensors:0.25"]
    ran("combine", *words, "--out", tmp_path / "out.safetensors")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    told = json.loads(metadata["loratune.combined"])["loras"]
    assert [(one["file"], one["weight"], one["metadata"]["ss_steps"]) for one in told] == [
        ("one.safetensors", 1.0, "0"),
        ("other.safetensors", 0.25, "7"),
    ]
    assert (metadata["ss_base_model_version"], metadata["ss_network_dim"]) == ("sd_v1", "6")
    assert metadata["modelspec.merged_from"] == "one, other"
    assert "ss_steps" not in metadata
    assert metadata.get("sshs_model_hash") != "old"


@QUICK
@given(st.integers(1, 5), st.sampled_from(["peft", "kohya"]))
def test_a_resized_layer_is_the_nearest_of_its_rank(tmp_path, rank, format):
    one = lora(tmp_path / "one.safetensors", 4, 6.0, Q, CONV)
    ran("resize", tmp_path / "one.safetensors", "--rank", rank, "--to", format, "--out", tmp_path / "out.safetensors")
    found = read_lora(tmp_path / "out.safetensors")
    for name in (Q, CONV):
        wanted = torch.linalg.svdvals(matrix(one, name))[rank:].norm()
        torch.testing.assert_close((matrix(one, name) - matrix(found, name)).norm(), wanted, rtol=1e-4, atol=1e-5)
        assert found.layers[name].rank == min(rank, 4)
        assert found.layers[name].down.dim() == len(SIZES[name])
    assert found.metadata["ss_network_dim"] == found.metadata["ss_network_alpha"] == str(min(rank, 4))
    assert found.metadata["ss_steps"] == "0"
    assert found.metadata.get("sshs_model_hash") != "old"


@QUICK
@given(st.floats(0.3, 1))
def test_a_share_is_kept_by_the_smallest_ranks(tmp_path, keep):
    one = lora(tmp_path / "one.safetensors", 4, 6.0, Q, K, CONV)
    ran("resize", tmp_path / "one.safetensors", "--keep", keep, "--out", tmp_path / "out.safetensors")
    found = read_lora(tmp_path / "out.safetensors")
    for name, part in found.layers.items():
        shares = torch.linalg.svdvals(matrix(one, name)).square().cumsum(0)
        shares /= shares[-1].clone()
        assert shares[part.rank - 1] >= keep - 1e-9
        assert part.rank == 1 or shares[part.rank - 2] < keep + 1e-9


def test_resizing_tells_the_error_of_each_layer(tmp_path, capsys):
    one = lora(tmp_path / "one.safetensors", 4, 6.0, Q)
    ran("resize", tmp_path / "one.safetensors", "--rank", "2", "--out", tmp_path / "out.safetensors")
    s = torch.linalg.svdvals(matrix(one, Q))
    told = capsys.readouterr().out
    assert f"{Q}: rank 4 -> 2, error {float(s[2:].norm() / s.norm()):.2e}" in told
    note = json.loads(read_header(tmp_path / "out.safetensors").metadata["loratune.resized"])
    assert (note["file"], note["rank"], note["keep"]) == ("one.safetensors", 2, None)


def test_a_middle_kernel_is_folded_in(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 6, 1, 1), (9, 3, 1, 1), (3, 3, 3, 3)]
    down, up, mid = (torch.randn(shape, generator=generator) for shape in shapes)
    tucker = LoRALayer(down, up, 2.0, mid=mid)
    from loratune.lora.resize import resized

    layers, errors = resized({CONV: tucker}, {CONV: SIZES[CONV]}, 3, None, torch.float64)
    torch.testing.assert_close(layers[CONV].matrix(torch.float64), tucker.matrix(torch.float64))
    assert errors.overall < 1e-12


def test_half_precision_is_told_as_error(tmp_path, capsys):
    one = lora(tmp_path / "one.safetensors", 3, 1.5, Q)
    words = ["--lora", f"{tmp_path}/one.safetensors:0.3", "--dtype", "float16", "--out", tmp_path / "out.safetensors"]
    ran("combine", *words)
    found = read_lora(tmp_path / "out.safetensors")
    assert found.layers[Q].up.dtype == torch.float16
    error = float((0.3 * matrix(one, Q) - matrix(found, Q)).norm() / (0.3 * matrix(one, Q)).norm())
    assert 1e-5 < error < 1e-3
    assert f"exact but for the rounding; relative Frobenius error {error:.2e}" in capsys.readouterr().out


def test_a_lora_of_zeros_stays_one(tmp_path):
    zero = LoRAFile({Q: LoRALayer(torch.ones(2, 8), torch.zeros(10, 2), 1.0)})
    write_lora(tmp_path / "zero.safetensors", zero)
    ran("resize", tmp_path / "zero.safetensors", "--keep", "0.9", "--out", tmp_path / "out.safetensors")
    found = read_lora(tmp_path / "out.safetensors").layers[Q]
    assert found.rank == 1
    assert not found.matrix().any()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resize", "one.safetensors", "--out", "o.safetensors"], "give --rank R or --keep SHARE"),
        (["resize", "one.safetensors", "--rank", "2", "--keep", "0.5", "--out", "o.safetensors"], "one of the two"),
        (["resize", "one.safetensors", "--rank", "0", "--out", "o.safetensors"], "--rank 0: give 1 or more"),
        (["resize", "one.safetensors", "--keep", "1.5", "--out", "o.safetensors"], "--keep 1.5"),
        (["resize", "one.safetensors", "--rank", "2", "--out", "one.safetensors"], "is one.safetensors itself"),
        (["resize", "one.safetensors", "--rank", "2", "--out", "o.ckpt"], "a LoRA is one .safetensors file"),
        (["resize", "none.safetensors", "--rank", "2", "--out", "o.safetensors"], "none.safetensors: there is no such"),
        (["combine", "--lora", "one.safetensors:x", "--out", "o.safetensors"], "'x' is no number"),
        (["combine", "--lora", "one.safetensors:nan", "--out", "o.safetensors"], "must be finite"),
        (["combine", "--lora", "one.safetensors:0", "--out", "o.safetensors"], "nothing to add"),
        (["combine", "--lora", "one.safetensors:1,down=0", "--out", "o.safetensors"], "weights are all 0"),
        (["combine", "--lora", "one.safetensors:1,left=0", "--out", "o.safetensors"], "no block 'left'"),
        (
            ["combine", "--lora", "one.safetensors", "--lora", "small.safetensors", "--out", "o.safetensors"],
            "give LoRAs for the same base",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    lora(Path("one.safetensors"), 3, 1.5, Q)
    write_lora("small.safetensors", LoRAFile({Q: LoRALayer(torch.ones(2, 3), torch.ones(4, 2), 1.0)}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
