"""Single files of every kind: told by their keys, loaded without a network, read by diffusers as by us."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loratune.diffusion.process import snr
from loratune.errors import UserError
from loratune.families import architectures as known
from loratune.families.base import Base, base_hash
from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.known import family_of, parts
from loratune.families.layout_vae import OLD_ATTENTION
from loratune.families.load import load_model
from loratune.families.save import configs_of, save_single_file, weights_of, write_folder, write_single_file
from loratune.families.sd import SPREAD_KEY
from loratune.families.sdxl import StableDiffusionXL
from loratune.families.single_file import canonical_keys, to_single_file
from loratune.formats.files import read_tensors, sha256_file, write_safetensors
from loratune.formats.headers import read_header

NAMES = ["sd15", "sd15-inpainting", "sd2", "sd2-inpainting", "sdxl", "sdxl-inpainting"]
Configs = dict[str, dict[str, Any]]
Weights = dict[str, dict[str, Tensor]]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys() and all(torch.equal(one[part][k], other[part][k]) for k in one[part])
        for part in one
    )


@pytest.fixture
def small(tiny_configs: Callable[..., Configs], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Configs]]:
    """The known architectures, made small, so that files of them are told by their keys and shapes alone."""
    configs = {name: tiny_configs(name) for name in NAMES}
    monkeypatch.setattr(known, "_architectures", lambda: configs)
    known._taken.cache_clear()
    yield configs
    known._taken.cache_clear()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def plain_file(path: Path, configs: Configs, weights: Weights, metadata: dict[str, str] | None = None) -> Path:
    """As others write it: nothing in it tells of us."""
    write_safetensors(path, to_single_file(weights, configs), metadata or {})
    return path


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_a_file_is_loaded_without_a_network(
    name: str, dtype: torch.dtype, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    weights = tiny_weights(small[name], dtype)
    file = plain_file(tmp_path / "misleading-sdxl-flux.safetensors", small[name], weights)
    family = load_model(str(file), dtype)
    assert family.family is family_of(small[name])
    assert same(weights_of(family, dtype), weights)
    kept = {part: {value.dtype for value in module.parameters()} for part, module in family.components().items()}
    assert kept.pop("vae") == {torch.float32 if name == "sdxl" else dtype}
    assert set.union(*kept.values()) == {dtype}
    assert all(not value.is_meta for value in [*family.parameters(), *family.buffers()])
    pads = [getattr(family, part).pad_token for part in family.family.tokenizers]
    assert pads == {"sd15": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[name]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_our_file_and_our_folder(
    name: str, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    configs, weights = small[name], tiny_weights(small[name])
    file, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    write_single_file(file, configs, weights)
    write_folder(folder, configs, weights)
    kind: Any = getattr(diffusers, family_of(configs).pipeline_of(configs))
    for pipe in (
        kind.from_single_file(str(file), config=str(folder), local_files_only=True),
        kind.from_pretrained(folder, local_files_only=True),
    ):
        assert same(
            {part: canonical_keys(parts()[part], getattr(pipe, part).state_dict()) for part in weights}, weights
        )
    for base in (Base.open(str(file)), Base.open(str(folder))):
        found, held = base.configs, base.weights()
        assert family_of(found).pipeline_of(found) == family_of(configs).pipeline_of(configs)
        assert same(held, weights)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_file_computes_what_diffusers_computes(
    name: str, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    configs, weights = small[name], tiny_weights(small[name])
    file, folder = plain_file(tmp_path / "one.safetensors", configs, weights), tmp_path / "folder"
    write_folder(folder, configs, weights)
    family = load_model(str(file)).eval()
    kind: Any = getattr(diffusers, family_of(configs).pipeline_of(configs))
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    captions = ["a red disc", "a very long caption " * 30]
    told, x, t = family.encode_prompts(captions), torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    if isinstance(family.family, StableDiffusionXL):
        text, _, pooled, _ = pipe.encode_prompt(captions)
        assert_close(told["pooled"], pooled)
        added = {"text_embeds": pooled, "time_ids": family.family.time_ids(family, x)}
        output = pipe.unet(x, t, text, added_cond_kwargs=added).sample
    else:
        text = pipe.encode_prompt(captions, "cpu", 1, True)[0]
        output = pipe.unet(x, t, text).sample
    assert_close(told["text"], text)
    assert_close(family.denoise(x, t, told), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_a_base_is_saved_as_a_file_and_is_the_same(
    name: str, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    small[name]["scheduler"] |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_folder(tmp_path / "folder", small[name], tiny_weights(small[name]))
    family = load_model(str(tmp_path / "folder"))
    save_single_file(family, tmp_path / "one.safetensors", torch.float32)
    again = load_model(str(tmp_path / "one.safetensors"))
    assert same(weights_of(again, torch.float32), weights_of(family, torch.float32))
    assert configs_of(again) == configs_of(family)
    assert torch.equal(again.noise_schedule.b, family.noise_schedule.b)
    header = read_header(tmp_path / "one.safetensors")
    assert ({"v_pred", "ztsnr"} <= header.tensors.keys()) == (name == "sdxl")
    assert header.metadata["modelspec.prediction_type"] == "v"
    architectures = {"sd15": "v1", "sd2": "v2-768-v", "sdxl": "xl-v1-base"}
    assert header.metadata["modelspec.architecture"] == f"stable-diffusion-{architectures[name]}"


# What the network predicts.


@pytest.mark.parametrize(
    ("spread", "metadata", "prediction", "side"),
    [
        (0.05, {}, "eps", 8),
        (0.12, {}, "v", 96),
        (0.12, {"modelspec.prediction_type": "epsilon"}, "eps", 8),
        (0.05, {"modelspec.prediction_type": "v"}, "v", 96),
    ],
)
def test_sd2_predicts_what_its_header_or_its_weights_tell(
    spread: float,
    metadata: dict[str, str],
    prediction: str,
    side: int,
    small: dict[str, Configs],
    tiny_weights: Callable[..., Weights],
    tmp_path: Path,
) -> None:
    tensors = to_single_file(tiny_weights(small["sd2"]), small["sd2"])
    width = len(tensors[SPREAD_KEY])
    tensors[SPREAD_KEY] = torch.tensor([spread, -spread] * (width // 2)) + 3
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    family = load_model(str(tmp_path / "x.safetensors"))
    assert family.prediction == prediction
    assert family.network.config["sample_size"] == side


def test_only_sd2_is_told_by_its_weights(
    small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    for name in ("sd15", "sd2-inpainting"):
        tensors = to_single_file(tiny_weights(small[name]), small[name])
        tensors[SPREAD_KEY] = 9 * torch.randn(len(tensors[SPREAD_KEY]))
        write_safetensors(tmp_path / f"{name}.safetensors", tensors, {})
        configs = Base.open(str(tmp_path / f"{name}.safetensors")).configs
        assert configs["scheduler"]["prediction_type"] == "epsilon"


def test_sdxl_files_are_marked_by_empty_tensors(
    small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    tensors = to_single_file(tiny_weights(small["sdxl"]), small["sdxl"])
    write_safetensors(tmp_path / "x.safetensors", tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {})
    family = load_model(str(tmp_path / "x.safetensors"))
    assert family.prediction == "v"
    a, b = family.noise_schedule.at(torch.tensor([999]), torch.zeros(1, 1, dtype=torch.float64))
    assert snr(a, b).item() == 0


# What is known and cannot be used everywhere, what is not complete, what is old.


@pytest.mark.parametrize("name", ["sd15-inpainting", "sdxl-inpainting"])
def test_inpainting_is_not_trained_or_drawn_with(
    name: str, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    weights = tiny_weights(small[name])
    file = plain_file(tmp_path / "x.safetensors", small[name], weights)
    write_folder(tmp_path / "folder", small[name], weights)
    for path in (file, tmp_path / "folder"):
        with pytest.raises(UserError, match=f"{path.name}: an inpainting model .*not trained or drawn with") as error:
            load_model(str(path))
        assert len(str(error.value).splitlines()) == 1
    assert Base.open(str(file)).configs["unet"]["in_channels"] == 9


def test_a_file_that_is_not_complete_is_told_with_its_name(
    small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    tensors = to_single_file(tiny_weights(small["sdxl"]), small["sdxl"])
    key = "conditioner.embedders.1.model.text_projection"
    carried = {CONFIGS_KEY: json.dumps(small["sdxl"])}
    write_safetensors(tmp_path / "x.safetensors", {k: v for k, v in tensors.items() if k != key}, carried)
    with pytest.raises(UserError, match=rf"x\.safetensors: '{key}' is missing"):
        load_model(str(tmp_path / "x.safetensors"))
    write_safetensors(tmp_path / "y.safetensors", {k: v for k, v in tensors.items() if k != key}, {})
    told = rf"y\.safetensors: nearly a Stable Diffusion XL checkpoint: '{key}' is missing"
    with pytest.raises(UserError, match=told):
        load_model(str(tmp_path / "y.safetensors"))


def test_a_folder_with_the_vaes_names_of_2023(
    small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    weights = tiny_weights(small["sd15"])
    write_folder(tmp_path / "folder", small["sd15"], weights)
    names = {new: old for old, new in OLD_ATTENTION.items()}
    old = dict(weights["vae"])
    for key in weights["vae"]:
        before, found, part = key.partition(".attentions.0.")
        name, _, kind = part.rpartition(".")
        if found and name in names:
            old[f"{before}{found}{names[name]}.{kind}"] = old.pop(key)
    assert old.keys() != weights["vae"].keys()
    write_safetensors(tmp_path / "folder" / "vae" / parts()["vae"].file, old, {})
    assert same(weights_of(load_model(str(tmp_path / "folder")), torch.float32), weights)


def test_loading_leaves_the_file_alone_and_the_random_numbers(
    small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    file = plain_file(tmp_path / "x.safetensors", small["sd15"], tiny_weights(small["sd15"]))
    before, state = sha256_file(file), torch.get_rng_state()
    family = load_model(str(file))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for value in family.parameters():
            value.zero_()
    assert sha256_file(file) == before
    assert any(bool(value.any()) for value in read_tensors(file).values())


def test_the_hash_of_a_base(small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path) -> None:
    file = plain_file(tmp_path / "x.safetensors", small["sd15"], tiny_weights(small["sd15"]))
    assert base_hash(str(file)) == sha256_file(file)
    plain_file(file, small["sd15"], tiny_weights(small["sd15"], seed=1))
    assert base_hash(str(file)) == sha256_file(file)
    assert base_hash("made in code") == ""


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_the_hash_of_a_folder_is_of_all_its_parts(
    part: str, small: dict[str, Configs], tiny_weights: Callable[..., Weights], tmp_path: Path
) -> None:
    weights = tiny_weights(small["sd15"])
    write_folder(tmp_path / "one", small["sd15"], weights)
    write_folder(tmp_path / "same", small["sd15"], weights)
    if part == "scheduler":
        small["sd15"]["scheduler"]["prediction_type"] = "v_prediction"
    else:
        key = next(iter(weights[part]))
        weights[part][key] = weights[part][key] + 1
    write_folder(tmp_path / "other", small["sd15"], weights)
    one, same, other = (base_hash(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other
    assert len(one) == 64
    shutil.rmtree(tmp_path / "one" / "unet")
    assert base_hash(str(tmp_path / "one")) == ""


@pytest.mark.parametrize(
    ("name", "prediction", "wanted"),
    [
        ("sd15", "epsilon", ("sd_v1", "stable-diffusion-v1/lora")),
        ("sd2", "epsilon", ("sd_v2", "stable-diffusion-v2-512/lora")),
        ("sd2", "v_prediction", ("sd_v2_v", "stable-diffusion-v2-768-v/lora")),
        ("sdxl", "epsilon", ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")),
    ],
)
def test_what_loras_say_they_are_for(
    name: str, prediction: str, wanted: tuple[str, str], small: dict[str, Configs]
) -> None:
    small[name]["scheduler"]["prediction_type"] = prediction
    family = family_of(small[name])
    assert (family.kohya_version(small[name]), f"{family.modelspec(small[name])}/lora") == wanted
