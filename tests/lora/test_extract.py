"""What is extracted is what was added, from every layout, with what cannot be held named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.cli.main import main
from loratune.families.architectures import module_names
from loratune.families.save import write_folder, write_single_file
from loratune.formats.headers import read_header
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.lora import LoRALayer

ENDS = ("attn2.to_k", "resnets.0.conv1", "0.proj_in", "layers.1.self_attn.k_proj", "layers.0.mlp.fc1", "label_emb")
Weights = dict[str, dict[str, Tensor]]


def chosen(configs: dict[str, Any]) -> list[str]:
    """A few layers of every kind in every component."""
    found: dict[str, str] = {}
    for name in module_names(configs):
        for end in ENDS:
            if name.endswith(end):
                found.setdefault(f"{name.partition('.')[0]} {end}", name)
    return list(found.values())


def small_lora(weights: Weights, names: list[str], rank: int) -> LoRAFile:
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name in names:
        component, _, key = name.partition(".")
        shape = weights[component][f"{key}.weight"].shape
        down = torch.randn(rank, *shape[1:], generator=generator) / 8
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / 8
        layers[name] = LoRALayer(down, up, 0.5 * rank)
    return LoRAFile(layers)


def added(weights: Weights, lora: LoRAFile) -> Weights:
    new = {component: dict(held) for component, held in weights.items()}
    for name, layer in lora.layers.items():
        component, _, key = name.partition(".")
        w = new[component][f"{key}.weight"]
        new[component][f"{key}.weight"] = (w.double() + layer.matrix(torch.float64).reshape(w.shape)).to(w.dtype)
    return new


def write(path: Path, configs: dict[str, Any], weights: Weights) -> Path:
    if path.suffix:
        write_single_file(path, configs, weights)
    else:
        write_folder(path, configs, weights)
    return path


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "sd15-inpainting"])
@pytest.mark.parametrize("target", ["tuned.safetensors", "tuned"])
def test_what_was_added_is_found_again(tmp_path, tiny_configs, tiny_weights, kind, target):
    configs = tiny_configs(kind)
    weights = tiny_weights(configs)
    lora = small_lora(weights, chosen(configs), rank=2)
    base = write(tmp_path / "base.safetensors", configs, weights)
    tuned = write(tmp_path / target, configs, added(weights, lora))
    words = [
        "extract",
        "--base",
        base,
        "--tuned",
        tuned,
        "--rank",
        2,
        "--dtype",
        "float32",
        "--out",
        tmp_path / "x.safetensors",
    ]
    assert main([str(word) for word in words]) == 0
    found = read_lora(tmp_path / "x.safetensors", module_names(configs))
    assert found.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        assert found.layers[name].down.dim() == layer.down.dim()
        # W - W_0 carries the rounding of W: at most half a unit of numbers below 1.
        torch.testing.assert_close(found.layers[name].matrix(), layer.matrix(), rtol=0, atol=1e-6)
    model = {"sd15": "sd_v1", "sd15-inpainting": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}[kind]
    told = configs["scheduler"].get("prediction_type")
    assert found.metadata["ss_base_model_version"] == (model if told == "v_prediction" else model.removesuffix("_v"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merged_again_it_is_the_tuned_one_within_the_printed_error(tmp_path, tiny_configs, tiny_weights, dtype, capsys):
    configs = tiny_configs("sd15")
    weights = tiny_weights(configs, dtype)
    lora = small_lora(weights, chosen(configs), rank=3)
    tuned = added(weights, lora)
    base = write(tmp_path / "base.safetensors", configs, weights)
    write(tmp_path / "tuned.safetensors", configs, tuned)
    words = ["--base", base, "--tuned", tmp_path / "tuned.safetensors", "--rank", "2"]
    assert main([str(word) for word in ("extract", *words, "--out", tmp_path / "x.safetensors")]) == 0
    printed = float(capsys.readouterr().out.partition("relative Frobenius error ")[2].split(";")[0])
    found = read_lora(tmp_path / "x.safetensors", module_names(configs))
    note = json.loads(found.metadata["loratune.extracted"])
    assert printed == pytest.approx(note["error"], rel=1e-2)
    apart = whole = 0.0
    for name in lora.layers:
        component, _, key = name.partition(".")
        w, w_0 = (held[component][f"{key}.weight"].double().flatten(1) for held in (tuned, weights))
        apart += float((w - w_0 - found.layers[name].matrix(torch.float64)).square().sum())
        whole += float((w - w_0).square().sum())
        best = torch.linalg.svdvals(w - w_0)[2:].square().sum()
        assert float((w - w_0 - found.layers[name].matrix(torch.float64)).square().sum()) <= 1.01 * best + 1e-6
    assert (apart / whole) ** 0.5 == pytest.approx(note["error"], rel=1e-4)
    assert 0.1 < note["error"] < 0.9


def test_the_share_that_is_kept_decides_the_ranks(tmp_path, tiny_configs, tiny_weights):
    configs = tiny_configs("sd15", 32)
    weights = tiny_weights(configs)
    names = ["unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    noise = {component: dict(held) for component, held in weights.items()}
    for seed, name in enumerate(names):
        w = weights["unet"][f"{name[5:]}.weight"]
        noise["unet"][f"{name[5:]}.weight"] = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
    words = ["--base", write(tmp_path / "base.safetensors", configs, weights), "--keep", 0.5]
    words += ["--tuned", write(tmp_path / "tuned.safetensors", configs, noise), "--out", tmp_path / "x.safetensors"]
    assert main([str(word) for word in ("extract", *words)]) == 0
    found = read_lora(tmp_path / "x.safetensors", module_names(configs))
    assert found.layers.keys() == set(names)
    for name, layer in found.layers.items():
        change = (noise["unet"][f"{name[5:]}.weight"] - weights["unet"][f"{name[5:]}.weight"]).flatten(1)
        shares = torch.linalg.svdvals(change.double()).square().cumsum(0)
        wanted = int((shares < 0.5 * shares[-1]).sum()) + 1
        assert wanted <= layer.rank <= wanted + 2


def test_what_a_lora_cannot_hold_is_counted_and_named(tmp_path, tiny_configs, tiny_weights, capsys):
    configs = tiny_configs("sdxl")
    weights = tiny_weights(configs)
    tuned = added(weights, small_lora(weights, chosen(configs), rank=1))
    for component, key in (("unet", "conv_in.bias"), ("vae", "encoder.conv_in.weight")):
        tuned[component][key] = tuned[component][key] + 1
    words = ["--base", write(tmp_path / "base.safetensors", configs, weights), "--rank", 1]
    words += ["--tuned", write(tmp_path / "tuned.safetensors", configs, tuned), "--out", tmp_path / "x.safetensors"]
    assert main([str(word) for word in ("extract", *words)]) == 0
    told = capsys.readouterr().out
    assert "2 tensors differ that a LoRA cannot hold: 1 of unet, 1 of vae (unet.conv_in.bias, vae.enc" in told
    assert json.loads(read_header(tmp_path / "x.safetensors").metadata["loratune.extracted"])["not_held"] == 2


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, tiny_configs, tiny_weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sd15, sdxl = tiny_configs("sd15"), tiny_configs("sdxl")
    write(Path("a.safetensors"), sd15, tiny_weights(sd15))
    write(Path("xl.safetensors"), sdxl, tiny_weights(sdxl))
    wide = tiny_configs("sd15", 16)
    write(Path("wide.safetensors"), wide, tiny_weights(wide))
    broken = tiny_weights(sd15)
    broken["unet"]["conv_in.weight"] = torch.full_like(broken["unet"]["conv_in.weight"], torch.nan)
    write(Path("nan.safetensors"), sd15, broken)
    write_lora("lora.safetensors", small_lora(tiny_weights(sd15), chosen(sd15)[:1], 1))
    before = {path.name for path in tmp_path.iterdir()}
    for tuned, rank, told in (
        ("a.safetensors", "2", "nothing to extract"),
        ("xl.safetensors", "2", "is Stable Diffusion XL, but a.safetensors is Stable Diffusion 1.x"),
        ("wide.safetensors", "2", "give two checkpoints of the same architecture"),
        ("nan.safetensors", "2", "values that are not finite"),
        ("lora.safetensors", "2", "a LoRA, not a base"),
        ("none.safetensors", "2", "no such file"),
        ("a.safetensors", "0", "--rank 0: give 1 or more"),
    ):
        words = ["extract", "--base", "a.safetensors", "--tuned", tuned, "--rank", rank, "--out", "o.safetensors"]
        assert main(words) == 2, told
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == before
