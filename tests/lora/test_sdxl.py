"""What diffusers makes of our LoRAs for SDXL, SD 2.x and of DoRAs: every key is taken, every layer scaled right."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loratune.families.architectures import module_names
from loratune.families.layout_text import canonical_text_name
from loratune.formats.headers import read_header
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.lora import LoRALayer

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@pytest.fixture(scope="module")
def pipeline(tiny_configs) -> StableDiffusionXLPipeline:
    configs = tiny_configs("sdxl", depth=1)
    torch.manual_seed(0)
    texts = {name: make(CLIPTextConfig(**configs[name])).eval() for name, make in ENCODERS.items()}
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(configs["vae"]),
        **texts,
        tokenizer=None,
        tokenizer_2=None,
        unet=UNet2DConditionModel.from_config(configs["unet"]).eval(),
        scheduler=DDIMScheduler(),
    )


@pytest.fixture(scope="module")
def names(tiny_configs) -> tuple[str, ...]:
    return module_names(tiny_configs("sdxl", depth=1))


def live(pipeline) -> dict[str, torch.nn.Module]:
    """Modules by canonical name."""
    found = {f"unet.{name}": part for name, part in pipeline.unet.named_modules()}
    for component in ENCODERS:
        for name, part in getattr(pipeline, component).named_modules():
            found[f"{component}.{canonical_text_name(name)}"] = part
    return found


def made(pipeline, names, size, dora: bool = False) -> LoRAFile:
    """Layers that fit; `size` gives rank and alpha by the place in the list."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index, name in enumerate(names):
        weight = live(pipeline)[name].weight
        rank, alpha = size(index)
        tail = [1] * (weight.dim() - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *tail, generator=generator) / 32
        m = weight.detach().flatten(1).norm(dim=1).reshape(-1, 1, *tail) * 1.5 if dora else None
        layers[name] = LoRALayer(down, up, alpha, magnitude=m)
    return LoRAFile(layers)


def adapted(pipeline) -> dict[str, LoraLayer]:
    return {name: part for name, part in live(pipeline).items() if isinstance(part, LoraLayer)}


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize(
    "size", [lambda i: (2, 1.0), lambda i: (1 + i % 3, float(2 ** (i % 4)))], ids=["one alpha", "mixed"]
)
def test_diffusers_takes_every_layer_of_sdxl(pipeline, names, tmp_path, format, size):
    taken = [name for name in names if name != "text_encoder_2.text_projection"]
    lora = made(pipeline, taken, size)
    write_lora(tmp_path / "a.safetensors", lora, format)
    assert read_lora(tmp_path / "a.safetensors").layers.keys() == lora.layers.keys()
    try:
        pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        found = adapted(pipeline)
        assert found.keys() == lora.layers.keys()
        for name, part in lora.layers.items():
            delta = found[name].get_delta_weight("default_0")
            torch.testing.assert_close(delta, part.matrix().view_as(delta), rtol=1e-5, atol=1e-6, msg=name)
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("ends", [("q_proj", "k_proj", "v_proj"), ("fc2",), ("text_projection",)])
@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_parts_of_text_encoders(pipeline, names, tmp_path, format, ends):
    lora = made(pipeline, [name for name in names if name.endswith(ends)], lambda i: (2, 1.0))
    write_lora(tmp_path / "a.safetensors", lora, format)
    assert read_lora(tmp_path / "a.safetensors") == lora
    try:
        pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        found = adapted(pipeline)
        assert found.keys() >= lora.layers.keys()
        for name, part in found.items():
            delta = part.get_delta_weight("default_0")
            wanted = lora.layers[name].matrix().view_as(delta) if name in lora.layers else torch.zeros_like(delta)
            torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-6, msg=name)
    finally:
        pipeline.unload_lora_weights()


@torch.no_grad()
def test_a_dora_in_peft_names_is_what_diffusers_makes_of_it(pipeline, names, tmp_path):
    picked = [name for name in names if ".attn2." in name or ".conv1" in name or "self_attn" in name]
    lora = made(pipeline, picked, lambda i: (2, 1.0), dora=True)
    write_lora(tmp_path / "a.safetensors", lora)
    before = {name: live(pipeline)[name].weight.double() for name in picked}
    try:
        pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        pipeline.fuse_lora(components=["unet", *ENCODERS])
        assert adapted(pipeline).keys() == lora.layers.keys()
        for name, part in adapted(pipeline).items():
            added = part.base_layer.weight.double() - before[name]
            torch.testing.assert_close(added, lora.layers[name].change(before[name]), rtol=1e-4, atol=1e-5, msg=name)
    finally:
        pipeline.unfuse_lora(components=["unet", *ENCODERS])
        pipeline.unload_lora_weights()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_foreign_key_never_gets_into_a_kohya_file(tmp_path, tiny_configs, data):
    """Trap 5: diffusers takes a file for kohya's by the beginnings of all of its keys."""
    family, loader = data.draw(
        st.sampled_from([("sd2", StableDiffusionLoraLoaderMixin), ("sdxl", StableDiffusionXLLoraLoaderMixin)])
    )
    configs = tiny_configs(family, depth=1)
    drawn = data.draw(st.lists(st.sampled_from(module_names(configs)), min_size=1, max_size=4, unique=True))
    layer = LoRALayer(torch.ones(1, 3), torch.ones(3, 1), 1.0)
    told = {"ss_base_model_version": "sdxl_base_v1-0" if family == "sdxl" else "sd_v2"}
    write_lora(tmp_path / "a.safetensors", LoRAFile(dict.fromkeys(drawn, layer), told), "kohya")
    unet = SimpleNamespace(layers_per_block=configs["unet"]["layers_per_block"])
    state, alphas = loader.lora_state_dict(str(tmp_path / "a.safetensors"), unet_config=unet)
    components = {key.partition(".")[0] for key in state}
    assert components == {name.partition(".")[0] for name in drawn}
    assert set(alphas.values()) == {1.0}


def test_the_metadata_tell_of_every_component(pipeline, names, tmp_path: Path):
    picked = [next(name for name in names if name.startswith(f"{part}.")) for part in ("unet", *ENCODERS)]
    write_lora(tmp_path / "a.safetensors", made(pipeline, picked, lambda i: (2, 1.0)))
    told = json.loads(read_header(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in told} == {"unet", *ENCODERS}
