"""inspect tells what a file is: a checkpoint by its header alone, a LoRA by its numbers too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratune.cli.main import main
from loratune.families.architectures import architectures, file_shapes, module_names
from loratune.families.blocks import block_of
from loratune.formats.headers import TensorInfo, header_bytes
from loratune.lora.compare import difference, sizes_by_block
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.fits import bases, fitting, layer_names, shapes_for
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.names import flat

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
Q, K = f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_k"
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def empty_checkpoint(path: Path, name: str, metadata: dict[str, str] | None = None) -> Path:
    """A full-size file of zeros that takes no room on the disk."""
    infos, end = [], 0
    for key, shape in file_shapes(architectures()[name]).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        infos.append((key, TensorInfo("F16", shape, start, end)))
    head = header_bytes(infos, metadata or {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + end)
    return path


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("name", "family", "variant"),
    [
        ("sd15", "Stable Diffusion 1.x", "text to image"),
        ("sd2", "Stable Diffusion 2.x", "text to image"),
        ("sdxl", "Stable Diffusion XL", "text to image"),
        ("sdxl-inpainting", "Stable Diffusion XL (inpainting)", "inpainting"),
    ],
)
def test_a_full_size_checkpoint_is_told_by_its_header(tmp_path, capsys, name, family, variant):
    note = json.dumps({"base": "a", "loras": [["b.safetensors", 0.5]]})
    metadata = {"loratune.merged": note, "modelspec.title": "T", "modelspec.prediction_type": "v"}
    found = told(capsys, empty_checkpoint(tmp_path / "a.safetensors", name, metadata))
    assert (found["kind"], found["family"], found["architecture"]) == ("checkpoint", family, name)
    assert (found["variant"], found["prediction"]) == (variant, "v_prediction")
    assert found["tensors"] == len(file_shapes(architectures()[name]))
    assert found["size"].endswith(f"bytes, F16 x {found['tensors']}")
    assert found["merged"] == {"loratune.merged": json.loads(note)}
    assert found["metadata"]["modelspec.title"] == "T"


def test_a_checkpoint_needs_neither_torch_nor_more_than_its_header(tmp_path):
    path = empty_checkpoint(tmp_path / "a.safetensors", "sdxl")
    code = (
        "import sys; from pathlib import Path; from loratune.cli.main import main; from loratune.lora import inspect;"
        "read = lambda: int(Path('/proc/self/io').read_text().split()[1]) if Path('/proc/self/io').exists() else 0;"
        "from loratune.families.architectures import architectures; architectures();"
        f"before = read(); assert main(['inspect', {str(path)!r}]) == 0; count = read() - before;"
        "heavy = {'torch', 'numpy', 'safetensors', 'diffusers', 'lightning'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else f'{count} bytes read' if count > LIMIT else 0)"
    )
    limit = 40_000_000  # the header's 0.3 MB and the modules that are imported late; the file has 6.9 GB
    done = subprocess.run([sys.executable, "-c", code.replace("LIMIT", str(limit))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Stable Diffusion XL" in done.stdout


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_folder_is_told_by_its_configurations(tmp_path, capsys, tiny_configs, tiny_weights, kind):
    from loratune.families.save import write_folder

    configs = tiny_configs(kind)
    write_folder(tmp_path / "base", configs, tiny_weights(configs))
    found = told(capsys, tmp_path / "base")
    assert found["family"] == {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}[kind]
    assert found["components"].keys() == configs.keys() - {"scheduler", "model_index"}


def test_other_files_are_called_by_their_name(tmp_path, capsys):
    save_file({"decoder.conv_in.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    assert told(capsys, tmp_path / "vae.safetensors")["kind"] == "a VAE alone"
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert told(capsys, tmp_path / "x.safetensors")["kind"] == "not a file that is known here"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(*names: str, rank: int = 3, alpha: float = 1.5, seed: int = 0) -> dict[str, LowRank]:
    """Layers in the sizes of SD 1.5, or of any other base that has them."""
    shapes = bases()["Stable Diffusion 1.x"]
    return {
        name: LoRALayer(rand(rank, *shapes[name][1:], seed=seed), rand(shapes[name][0], rank, seed=seed + 1), alpha)
        for name in names
    }


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_lora_is_told_with_its_numbers(tmp_path, capsys, format):
    metadata = {"loratune.base": "b", "ss_steps": "200", "ss_max_train_steps": "400", "ss_seed": "None"}
    metadata |= {"ss_tag_frequency": json.dumps({"one": {"cat": 3, "dog": 1}, "two": {"dog": 4}}), "note": "n"}
    held = layers(Q, K, MID)
    write_lora(tmp_path / "a.safetensors", LoRAFile(held, metadata), format)
    found = told(capsys, tmp_path / "a.safetensors")
    assert (found["kind"], found["format"], found["family"]) == ("LoRA", format, "Stable Diffusion 1.x")
    assert (found["rank"], found["alpha"], found["layers"]) == ([3], [1.5], 3)
    assert {target[:5] for target in found["targets"]} == {"attn1", "attn2"}
    assert found["readers"]["loratune"]["loads"] == found["readers"]["diffusers"]["loads"] == "whole"
    assert found["readers"]["ComfyUI"]["loads"] == ("whole" if format == "kohya" else "not known")
    assert found["training"] == {"steps": "200 / 400", "most frequent tags": "dog, cat"}
    assert (found["base"], found["metadata"]["note"]) == ("b", "n")
    spectra = {name: torch.linalg.svdvals(layer.matrix(torch.float64))[:3] for name, layer in held.items()}
    block = torch.cat([spectra[Q], spectra[K]])
    assert found["norm of (alpha/r) B A"]["down.0"] == pytest.approx(float(block.norm()))
    assert found["norm of (alpha/r) B A"]["mid"] == pytest.approx(float(spectra[MID].norm()))
    assert found["spectral norm"]["down.0"] == pytest.approx(float(block.max()))
    p = spectra[MID] / spectra[MID].sum()
    assert found["effective rank"]["mid"] == pytest.approx(float((-(p * p.log()).sum()).exp()))


def test_the_table_shows_all_of_it_and_runs_nothing_that_metadata_say(tmp_path, capsys):
    nasty = {"loratune.base": "[/bold] [red]\x1b[2J\x07", "evil [x]": "\x1b]0;title\x07" + "long " * 100}
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers(Q), nasty))
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[/bold] [red]\\x1b[2J\\x07" in shown
    assert "down.0: " in shown
    assert "diffusers: whole" in shown


def test_what_is_not_finite_is_counted(tmp_path, capsys):
    down = torch.ones(2, 320)
    down[0, :3] = torch.nan
    down[1, 0] = -torch.inf
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": torch.ones(320, 2)}, tmp_path / "a.safetensors")
    found = told(capsys, tmp_path / "a.safetensors")
    assert found["not finite"] == {f"{Q}.lora_A.weight": {"nan": 3, "inf": 1}}
    assert found["readers"]["loratune"]["loads"] == "refused"
    assert "not finite" in found["readers"]["loratune"]["notes"][0]["why"]
    assert found["rank"] == [2]
    assert "norm of (alpha/r) B A" not in found


def test_a_lora_that_is_not_read_here_is_told_by_its_keys(tmp_path, capsys):
    key = "lora_unet_something_attn2_to_k"
    tensors = {f"{key}.lora_down.weight": torch.ones(4, 2048), f"{key}.lora_up.weight": torch.ones(640, 4)}
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    found = told(capsys, tmp_path / "a.safetensors")
    assert found["family"] == "Stable Diffusion XL, by its text width alone"
    assert (found["rank"], found["alpha"], found["format"]) == ([4], [2.0], "kohya")
    save_file({**tensors, f"{key}.dora_scale": torch.ones(640, 1)}, tmp_path / "a.safetensors")
    found = told(capsys, tmp_path / "a.safetensors")
    assert found["kind"] == "LoRA with DoRA"
    assert found["readers"]["diffusers"]["loads"] == "with another strength"


def test_two_loras_are_compared_by_their_factors(tmp_path, capsys):
    one, other = layers(Q, K), layers(Q, MID, rank=2, alpha=2.0, seed=5)
    for name, held in (("one", one), ("other", other)):
        write_lora(tmp_path / f"{name}.safetensors", LoRAFile(held))
    found = told(capsys, tmp_path / "one.safetensors", "--diff", tmp_path / "other.safetensors")
    left, right = one[Q].matrix(torch.float64), other[Q].matrix(torch.float64)
    alone, extra = one[K].matrix(torch.float64), other[MID].matrix(torch.float64)
    apart = ((left - right).square().sum() + alone.square().sum() + extra.square().sum()) ** 0.5
    own = (left.square().sum() + alone.square().sum()) ** 0.5
    theirs = (right.square().sum() + extra.square().sum()) ** 0.5
    assert (found["only in A"], found["only in B"]) == ([K], [MID])
    assert (found["other rank"], found["other alpha"]) == ({Q: [3, 2]}, {Q: [1.5, 2.0]})
    assert found["relative_distance"] == pytest.approx(float(apart / own))
    assert found["cosine"] == pytest.approx(float((left * right).sum() / (own * theirs)))
    assert found["blocks"]["mid"] == {"relative_distance": None, "cosine": None}
    same = told(capsys, tmp_path / "one.safetensors", "--diff", tmp_path / "one.safetensors")
    assert (same["relative_distance"], same["cosine"]) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


def test_only_loras_of_one_base_are_compared(tmp_path, capsys):
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers(Q)))
    write_lora(tmp_path / "b.safetensors", LoRAFile({Q: LoRALayer(rand(2, 3), rand(4, 2), 1.0)}))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for other, message in (("b", "for different bases"), ("x", "is no LoRA"), ("none", "there is no such file")):
        assert main(["inspect", str(tmp_path / "a.safetensors"), "--diff", str(tmp_path / f"{other}.safetensors")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_zero_by_zero_is_no_distance():
    zero = {Q: LoRALayer(torch.zeros(1, 3), torch.zeros(4, 1), 1.0)}
    found = difference(zero, zero, [Q])
    assert (found["relative_distance"], found["cosine"]) == (None, None)
    assert sizes_by_block(zero.items())["down.0"]["effective_rank"] == 0


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_every_layer_of_an_architecture_fits_it(name):
    from loratune.families.architectures import title

    called = title(architectures()[name])
    sizes = {key: flat(shape) for key, shape in bases()[called].items()}
    assert sizes.keys() == set(module_names(architectures()[name]))
    assert fitting(sizes) == [called]
    assert shapes_for(sizes) == bases()[called]
    assert not fitting({**sizes, "unet.more": (1, 1)})
    assert not fitting({**sizes, "unet.conv_in": (1, 1)})


def test_what_only_an_inpainting_base_has_fits_that():
    assert fitting({"unet.conv_in": flat((320, 9, 3, 3))}) == [
        "Stable Diffusion 1.x (inpainting)",
        "Stable Diffusion 2.x (inpainting)",
        "Stable Diffusion XL (inpainting)",
    ]
    text = bases()["Stable Diffusion 1.x"][TEXT]
    assert fitting({TEXT: flat(text)}) == ["Stable Diffusion 1.x", "Stable Diffusion XL"]
    assert {*module_names(architectures()["sdxl"])} <= {*layer_names()}


def test_blocks():
    assert [block_of(name) for name in (Q, MID, TEXT)] == [
        "down.0",
        "mid",
        "te1",
    ]
    assert block_of("unet.conv_in") == "unet"
