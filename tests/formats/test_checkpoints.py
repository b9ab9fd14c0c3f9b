"""The single-file table against real files, and there and back against diffusers' own conversion."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from loratune.errors import UserError
from loratune.formats.architectures import (
    IGNORED,
    architectures,
    describe_unsupported,
    detect,
    file_shapes,
    module_names,
    single_file_table,
    text_table,
    unet_table,
    vae_table,
)
from loratune.formats.checkpoints import canonical_text_keys, from_single_file, module_text_keys, to_single_file
from loratune.formats.headers import Header, TensorInfo

DATA = Path(__file__).parent / "data"
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 12,
}
UNET_3 = {
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
}
UNET_4 = architectures()["sd15"]["unet"] | {
    "block_out_channels": [8, 16, 24, 24],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE_2 = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
}
VAE_4 = architectures()["sd15"]["vae"] | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
SMALL = {
    "three levels": {"unet": UNET_3, "vae": VAE_2, "text_encoder": TEXT},
    "as SD 1.5": {"unet": UNET_4, "vae": VAE_4, "text_encoder": TEXT},
}


def real_header(name: str) -> Header:
    raw = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    metadata = raw.pop("__metadata__", None) or {}
    return Header(metadata, {key: TensorInfo(value[0], tuple(value[1:]), 0, 0) for key, value in raw.items()}, 0, 0)


def header_of(shapes: dict[str, tuple[int, ...]]) -> Header:
    return Header({}, {key: TensorInfo("F16", shape, 0, 0) for key, shape in shapes.items()}, 0, 0)


def modules(configs: dict) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(**configs["unet"]),
        "vae": AutoencoderKL(**configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    }


def state_dicts(configs: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {name: module.state_dict() for name, module in modules(configs).items()}


def test_the_table_is_the_real_file_key_for_key_and_shape_for_shape():
    header = real_header("sd15")
    weights = {key: info.shape for key, info in header.tensors.items() if not key.startswith(IGNORED)}
    assert file_shapes(architectures()["sd15"]) == weights
    assert len(header.tensors) - len(weights) == 1


@pytest.mark.parametrize("kind", SMALL)
def test_tables_have_the_keys_of_the_models(kind):
    configs, held = SMALL[kind], state_dicts(SMALL[kind])
    table = single_file_table(configs["unet"], configs["vae"], configs["text_encoder"])
    assert len(set(table.values())) == len(table)
    assert unet_table(configs["unet"]).keys() == held["unet"].keys()
    assert vae_table(configs["vae"]).keys() == held["vae"].keys()
    assert text_table(configs["text_encoder"]).keys() == canonical_text_keys(held["text_encoder"]).keys()


@pytest.mark.parametrize("kind", SMALL)
def test_there_and_back_is_the_same_bit_for_bit(kind):
    configs, held = SMALL[kind], state_dicts(SMALL[kind])
    file = to_single_file(held, configs)
    assert {key: tuple(value.shape) for key, value in file.items()} == file_shapes(configs)
    back = from_single_file(file, {**configs, "scheduler": {}})
    back["text_encoder"] = module_text_keys(back["text_encoder"], held["text_encoder"])
    for component, tensors in held.items():
        assert back[component].keys() == tensors.keys()
        assert all(torch.equal(back[component][key], value) for key, value in tensors.items())


def test_diffusers_reads_our_file_as_we_do():
    configs, held = SMALL["as SD 1.5"], state_dicts(SMALL["as SD 1.5"])
    file = to_single_file(held, configs)
    theirs = {
        "unet": convert_ldm_unet_checkpoint(file, configs["unet"]),
        "vae": convert_ldm_vae_checkpoint(file, configs["vae"]),
    }
    for component, tensors in theirs.items():
        assert tensors.keys() == held[component].keys()
        assert all(torch.equal(value, held[component][key]) for key, value in tensors.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer_layers_per_block": [1, 2, 1]},
        {"layers_per_block": [1, 2, 1]},
        {"use_linear_projection": True},
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]},
        {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
        {"block_out_channels": [8, 8, 24], "in_channels": 9},
    ],
)
def test_the_rules_follow_the_configuration(changes):
    config = UNET_3 | changes
    with torch.device("meta"):
        held = UNet2DConditionModel(**config).state_dict()
    configs = {"unet": config, "vae": VAE_2, "text_encoder": TEXT}
    shapes = file_shapes(configs)
    table = {key: shapes[f"model.diffusion_model.{ldm}"] for key, ldm in unet_table(config).items()}
    assert table == {key: tuple(value.shape) for key, value in held.items()}


def test_a_vae_without_quant_conv_and_middle_attention():
    config = VAE_2 | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    with torch.device("meta"):
        assert vae_table(config).keys() == AutoencoderKL(**config).state_dict().keys()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (UNET_3 | {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        (UNET_3 | {"down_block_types": ["AttnDownBlock2D"] * 3}, "'AttnDownBlock2D' is not known"),
        ({key: value for key, value in UNET_3.items() if key != "in_channels"}, "in_channels is missing"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(config, told):
    with pytest.raises(UserError, match=told):
        unet_table(config)


def test_a_vae_of_another_kind_is_refused():
    with pytest.raises(UserError, match="'AttnDownEncoderBlock2D' is not known"):
        vae_table(VAE_2 | {"down_block_types": ["AttnDownEncoderBlock2D"] * 2})


def test_buffers_of_real_files_are_left_out_and_other_keys_named():
    configs = SMALL["three levels"]
    file = to_single_file(state_dicts(configs), configs)
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None],
        "model_ema.decay": torch.tensor(1.0),
        "betas": torch.ones(3),
        "sqrt_alphas_cumprod": torch.ones(3),
    }
    assert from_single_file(file | extra, configs).keys() == {"unet", "vae", "text_encoder"}
    with pytest.raises(UserError, match=r"'model\.diffusion_model\.new' is not part of this architecture"):
        from_single_file(file | {"model.diffusion_model.new": torch.ones(1)}, configs)
    key = "model.diffusion_model.out.2.bias"
    with pytest.raises(UserError, match=r"'model\.diffusion_model\.out\.2\.bias' is missing"):
        from_single_file({name: value for name, value in file.items() if name != key}, configs)
    with pytest.raises(UserError, match=r"has shape \(5,\); this architecture has \(4,\)"):
        from_single_file(file | {key: torch.ones(5)}, configs)
    with pytest.raises(UserError, match=r"'unet\.new' is not part"):
        to_single_file(state_dicts(configs) | {"unet": {"new": torch.ones(1)}}, configs)


def test_attention_of_a_vae_is_taken_as_a_matrix_too():
    configs = SMALL["three levels"]
    file = to_single_file(state_dicts(configs), configs)
    flat = {key: value.flatten(1) if "attn_1.q.weight" in key else value for key, value in file.items()}
    back = from_single_file(flat, configs)["vae"]["encoder.mid_block.attentions.0.to_q.weight"]
    assert back.shape == (16, 16)


def test_text_keys_of_both_majors_of_transformers():
    bare = {"encoder.layers.0.mlp.fc1.weight": torch.ones(1), "embeddings.position_ids": torch.ones(1)}
    full = {"text_model.encoder.layers.0.mlp.fc1.weight": bare["encoder.layers.0.mlp.fc1.weight"]}
    assert canonical_text_keys(bare) == full == canonical_text_keys(full)
    for state_dict in (bare, full):
        for keys in (bare, full):
            assert module_text_keys(state_dict, keys).keys() == keys.keys() - {"embeddings.position_ids"}
    assert module_text_keys({"new": torch.ones(1)}, bare).keys() == {"text_model.new"}


def test_the_architecture_is_told_by_keys_and_shapes():
    header = real_header("sd15")
    assert detect(header) == "sd15"
    assert describe_unsupported(header) is None
    assert detect(real_header("sdxl")) is None
    assert detect(header_of(file_shapes(SMALL["as SD 1.5"]))) is None


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler"])
def test_configurations_are_whole_and_copies(name):
    architectures()["sd15"][name].clear()
    assert architectures()["sd15"][name]


def sd15_without(prefix: str) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in real_header("sd15").tensors.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (real_header("sdxl"), "SDXL"),
        (real_header("sd15_lora_attn_r16"), "LoRA"),
        (real_header("sdxl_lora_attn_r16"), "LoRA"),
        (header_of({"cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (1,)}), "2.x"),
        (header_of({"conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias": (1,)}), "refiner"),
        (header_of({"model.diffusion_model.joint_blocks.0.x": (1,)}), "Diffusion 3"),
        (header_of({"double_blocks.0.img_attn.norm": (1,)}), "FLUX"),
        (header_of({"control_model.input_hint_block.0.bias": (1,)}), "ControlNet"),
        (header_of({"decoder.conv_in.weight": (1,)}), "VAE alone"),
        (header_of({"first_stage_model.decoder.conv_in.weight": (1,)}), "VAE alone"),
        (header_of({"down_blocks.0.attentions.0.norm.weight": (1,)}), "U-Net alone"),
        (header_of(sd15_without("first_stage_model.")), "no vae"),
        (
            header_of(sd15_without("none") | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}),
            "9 channels",
        ),
    ],
)
def test_other_kinds_of_file_are_named(header, told):
    assert detect(header) is None
    assert told in (describe_unsupported(header) or "")


def test_a_file_that_tells_nothing_has_no_name():
    assert describe_unsupported(header_of({"x": (1,)})) is None


def test_layers_a_lora_can_adapt_are_the_matrices_and_convolutions():
    configs = SMALL["three levels"]
    found = set(module_names(configs))
    live = modules(configs)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {f"unet.{name}" for name, part in live["unet"].named_modules() if isinstance(part, kinds)}
    text = {name: torch.ones(1) for name, part in live["text_encoder"].named_modules() if isinstance(part, kinds)}
    expected |= {f"text_encoder.{name}" for name in canonical_text_keys(text)}
    assert found == expected
