"""Conversion is exact, refused, or approximated when asked to; it says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.formats.files import read_tensors, tensors_hash
from loratune.formats.headers import read_header
from loratune.lora.algebra import factors
from loratune.lora.convert import approximated
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.reading import Source

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
Q, K = f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_k"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_there_and_back_is_the_same_bit_for_bit(tmp_path, capsys):
    one = LoRAFile({Q: LoRALayer(rand(3, 8), rand(10, 3), 1.5), K: LoRALayer(rand(3, 6), rand(10, 3), 1.5)}, {"a": "b"})
    write_lora(tmp_path / "a.safetensors", one)
    assert run("convert", tmp_path / "a.safetensors", "--to", "kohya", "--out", tmp_path / "b.safetensors") == 0
    assert "2 layers (LoRA) as kohya, exactly" in capsys.readouterr().out
    assert all(key.startswith("lora_unet_") for key in read_header(tmp_path / "b.safetensors").tensors)
    assert run("convert", tmp_path / "b.safetensors", "--to", "peft", "--out", tmp_path / "c.safetensors") == 0
    back = read_lora(tmp_path / "c.safetensors")
    assert back.layers == one.layers
    assert back.metadata["a"] == "b"
    assert json.loads(back.metadata["loratune.converted"])["file"] == "b.safetensors"
    held = [
        {f"{name}.{key}": t for name, part in file.layers.items() for key, t in part.tensors().items()}
        for file in (one, back)
    ]
    assert tensors_hash(held[0]) == tensors_hash(held[1])


def test_a_cast_is_told_as_error(tmp_path, capsys):
    one = LoRAFile({Q: LoRALayer(rand(3, 8), rand(10, 3), 1.5)})
    write_lora(tmp_path / "a.safetensors", one)
    words = ["--to", "peft", "--dtype", "bfloat16", "--out", tmp_path / "b.safetensors"]
    assert run("convert", tmp_path / "a.safetensors", *words) == 0
    found = read_lora(tmp_path / "b.safetensors").layers[Q].matrix(torch.float64)
    wanted = one.layers[Q].matrix(torch.float64)
    error = float((found - wanted).norm() / wanted.norm())
    assert f"1 of them rounded; relative Frobenius error {error:.2e}" in capsys.readouterr().out


def test_alphas_folded_with_rounding_are_told_as_error(tmp_path, capsys):
    one = LoRAFile({Q: LoRALayer(rand(3, 8), rand(10, 3), 1.0), K: LoRALayer(rand(2, 6), rand(10, 2), 0.3)})
    write_lora(tmp_path / "a.safetensors", one)
    words = ["--to", "kohya", "--dtype", "float32", "--out", tmp_path / "b.safetensors"]
    assert run("convert", tmp_path / "a.safetensors", *words) == 0
    assert "1 of them rounded; relative Frobenius error" in capsys.readouterr().out


def test_a_dora_is_converted_exactly(tmp_path, capsys):
    dora = LoRALayer(rand(2, 320), rand(320, 2), 2.0, magnitude=rand(320, 1).abs() + 1)
    write_lora(tmp_path / "a.safetensors", LoRAFile({Q: dora}), "kohya")
    assert run("convert", tmp_path / "a.safetensors", "--to", "peft", "--out", tmp_path / "b.safetensors") == 0
    assert "(DoRA of LoRA) as peft, exactly" in capsys.readouterr().out


def test_what_the_format_cannot_hold_is_refused_or_approximated(tmp_path, capsys):
    one = LoRAFile({Q: LoRALayer(rand(3, 8), rand(10, 3), 1.0), K: LoRALayer(rand(2, 6), rand(10, 2), 0.3)})
    write_lora(tmp_path / "a.safetensors", one)
    words = ["convert", tmp_path / "a.safetensors", "--to", "kohya", "--out", tmp_path / "b.safetensors"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "the alphas differ (0.3, 1)" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert run(*words, "--rank", 4) == 0
    told = capsys.readouterr().out
    assert "approximated (the alphas differ" in told
    found = read_lora(tmp_path / "b.safetensors")
    assert {name: layer.rank for name, layer in found.layers.items()} == {Q: 3, K: 2}
    for name, layer in one.layers.items():
        torch.testing.assert_close(found.layers[name].matrix(), layer.matrix())


def test_a_product_of_products_is_approximated_at_a_rank(monkeypatch):
    loha = LoHaLayer(rand(10, 2), rand(2, 8), rand(10, 2) + 1, rand(2, 8), 2.0)
    monkeypatch.setattr("loratune.lora.convert.shapes_of", lambda path, layers: {Q: (10, 8)})
    for rank in (1, 3, 8):
        layers, errors = approximated(Source(Path("x"), "kohya", LoRAFile({Q: loha})), rank, torch.float64)
        s = torch.linalg.svdvals(loha.matrix(torch.float64))
        assert errors.overall == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-9)
        assert layers[Q].rank == min(rank, factors(loha).rank)


def test_dora_is_not_approximated():
    from loratune.lora.reading import refuse_dora

    dora = LoRALayer(rand(2, 8), rand(10, 2), 1.0, magnitude=rand(10, 1))
    with pytest.raises(UserError, match=r"x: unet\..*to_q is a DoRA of LoRA, which") as caught:
        refuse_dora(Source(Path("x"), "kohya", LoRAFile({Q: dora})), "which depends on the base")
    assert "\n" not in str(caught.value)


def loha() -> LoHaLayer:
    return LoHaLayer(rand(320, 2), rand(2, 320), rand(320, 2) + 1, rand(2, 320), 2.0)


def test_lycoris_stays_what_it_is_in_kohya_and_is_approximated_in_peft(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    write_lora(source, LoRAFile({Q: loha()}), "kohya")
    assert run("convert", source, "--to", "kohya", "--out", tmp_path / "b.safetensors") == 0
    assert "(LoHa) as kohya, exactly" in capsys.readouterr().out
    assert read_lora(tmp_path / "b.safetensors").layers[Q] == loha()
    words = ["convert", source, "--to", "peft", "--out", tmp_path / "c.safetensors"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "LoHa" in error
    assert "--rank R to approximate" in error
    assert run(*words, "--rank", "2") == 0
    found = read_lora(tmp_path / "c.safetensors")
    s = torch.linalg.svdvals(loha().matrix(torch.float64))
    assert f"relative Frobenius error {float(s[2:].norm() / s.norm()):.2e}" in capsys.readouterr().out
    assert (found.layers[Q].kind, found.layers[Q].rank) == ("LoRA", 2)


def test_other_kinds_are_combined_and_resized_at_a_rank_only(tmp_path, capsys):
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    write_lora(source, LoRAFile({Q: loha()}), "kohya")
    assert run("combine", "--lora", source, "--out", out) == 2
    assert f"{Q} is a LoHa, which is no B A; give --rank R" in capsys.readouterr().err
    assert run("combine", "--lora", f"{source}:0.5", "--rank", 4, "--out", out) == 0
    torch.testing.assert_close(read_lora(out).layers[Q].matrix(), 0.5 * loha().matrix(), rtol=1e-4, atol=1e-4)
    assert run("resize", source, "--rank", 4, "--out", out) == 0
    torch.testing.assert_close(read_lora(out).layers[Q].matrix(), loha().matrix(), rtol=1e-4, atol=1e-4)


def test_dora_is_refused_by_name_where_no_base_is(tmp_path, capsys):
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    dora = LoRALayer(rand(2, 320), rand(320, 2), 2.0, magnitude=rand(320, 1).abs() + 1)
    write_lora(source, LoRAFile({Q: dora}), "kohya")
    for words in (["combine", "--lora", source, "--rank", 4], ["resize", source, "--rank", 1]):
        assert run(*words, "--out", out) == 2
        error = capsys.readouterr().err
        assert f"{Q} is a DoRA of LoRA, whose change depends on the base" in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("words", [("convert", "--to", "kohya"), ("resize", "--rank", "1"), ("combine",)])
def test_learned_tokens_are_written_beside(tmp_path, monkeypatch, words):
    layer = LoRALayer(rand(2, 320), rand(320, 2), 2.0)
    write_lora(tmp_path / "a.safetensors", LoRAFile({Q: layer}))
    read = LoRAFile({Q: layer}, {}, {"<cat>": rand(1, 768)})
    monkeypatch.setattr("loratune.lora.reading.read_lora", lambda path, names: read)
    given = ["--lora", tmp_path / "a.safetensors"] if words == ("combine",) else [tmp_path / "a.safetensors"]
    assert run(words[0], *given, *words[1:], "--out", tmp_path / "o.safetensors") == 0
    assert torch.equal(read_tensors(tmp_path / "o-cat.safetensors")["<cat>"], rand(1, 768))
