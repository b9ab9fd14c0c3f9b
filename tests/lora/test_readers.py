"""What is said of diffusers is what diffusers does: each claim is run with a small pipeline of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loratune.families.layout_text import canonical_text_name
from loratune.formats.headers import read_header
from loratune.lora.readers import CHANGED, NOTHING, PART, READS, REFUSED, UNKNOWN, WHOLE, read_keys, verdicts

UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 12,
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = "text_model.encoder.layers.0"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [*"abcdefghijklmnop", *(f"{letter}</w>" for letter in "abcdefghijklmnop")]
    words = {word: index for index, word in enumerate([*letters, "ab", "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def shape(path: str) -> tuple[int, int]:
    return {"fc1": (16, 8), "fc2": (8, 16), "2": (8, 32)}.get(path.rpartition(".")[2], (8, 8))


def kohya(*paths: str, alpha: float | None = 2.0, rank: int = 2) -> dict[str, Tensor]:
    """Plain layers of U-Net (down_blocks...) and text encoder (text_model...)."""
    tensors = {}
    for path in paths:
        prefix = "lora_te_" if path.startswith("text_model") else "lora_unet_"
        name = prefix + path.replace(".", "_")
        outer, inner = shape(path)
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(rank, inner),
            f"{name}.lora_up.weight": torch.ones(outer, rank),
        }
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(
    *paths: str, prefix: str = "", ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
) -> dict[str, Tensor]:
    tensors = {}
    for path in paths:
        name = prefix + ("text_encoder." if path.startswith("text_model") else "unet.") + path
        outer, inner = shape(path)
        tensors |= {f"{name}{ends[0]}": torch.ones(2, inner), f"{name}{ends[1]}": torch.ones(outer, 2)}
    return tensors


Q, K, OUT, FF = f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"
TE = [f"{LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
ONE = "lora_unet_" + Q.replace(".", "_")
OLD = {
    f"{BLOCK}.attn2.processor.to_q_lora.down.weight": torch.ones(2, 8),
    f"{BLOCK}.attn2.processor.to_q_lora.up.weight": torch.ones(8, 2),
}
METADATA = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": [Q]})}

# Tensors, what diffusers makes of them, how many layers it adapts, and how many keys are told of.
CASES: dict[str, tuple[dict[str, Tensor], str, int, int]] = {
    "kohya": (kohya(Q, K, OUT, *TE), WHOLE, 7, 0),
    "kohya without alpha": (kohya(Q, K, alpha=None), WHOLE, 2, 0),
    "peft": (peft(Q, K, *TE[:3]), WHOLE, 5, 0),
    "diffusers": (peft(Q, K, ends=(".lora.down.weight", ".lora.up.weight")), WHOLE, 2, 0),
    "old diffusers": ({f"unet.{key}": value for key, value in OLD.items()}, WHOLE, 1, 0),
    "old diffusers without prefix": (OLD, NOTHING, 0, 2),
    "peft with alpha": ({**peft(Q), f"unet.{Q}.alpha": torch.tensor(1.0)}, REFUSED, 0, 1),
    "cloneofsimo": ({"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 8)}, REFUSED, 0, 2),
    "a foreign key": ({**kohya(Q), "bundle_emb.x": torch.ones(1)}, REFUSED, 0, 1),
    "a foreign lora": ({**kohya(Q, alpha=None), "lora_prior_x.lora_up.weight": torch.ones(1, 1)}, NOTHING, 0, 2),
    "lycoris names": (
        {key.replace("lora_unet_", "lycoris_"): value for key, value in kohya(Q, alpha=None).items()},
        NOTHING,
        0,
        2,
    ),
    "lycoris names with alpha": (
        {key.replace("lora_unet_", "lycoris_"): value for key, value in kohya(Q).items()},
        REFUSED,
        0,
        1,
    ),
    "LoHa": ({f"{ONE}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}, REFUSED, 0, 4),
    "LoKr": ({f"{ONE}.lokr_w1": torch.ones(2, 2), f"{ONE}.lokr_w2": torch.ones(4, 4)}, REFUSED, 0, 2),
    "a middle": ({**kohya(Q), f"{ONE}.lora_mid.weight": torch.ones(2, 2, 1, 1)}, REFUSED, 0, 1),
    "DoRA": ({**kohya(Q), f"{ONE}.dora_scale": torch.ones(8, 1)}, CHANGED, 1, 1),
    "alphas that differ": ({**kohya(Q, K, FF), **kohya(OUT, alpha=1.0)}, CHANGED, 4, 1),
    "another alpha outside attention": ({**kohya(Q, K), **kohya(FF, alpha=1.0)}, WHOLE, 3, 0),
    "text q, k, v": (kohya(Q, *TE[:3]), REFUSED, 0, 9),
    "text q, k, v and mlp": (kohya(Q, *TE[:3], f"{LAYER}.mlp.fc1"), PART, 2, 9),
    "a peft adapter": (peft(Q, prefix="base_model.model."), NOTHING, 0, 2),
    "another component": ({**peft(Q), **{k.replace("unet", "prior"): v for k, v in peft(K).items()}}, PART, 1, 2),
    "a component that metadata leave out": (peft(Q, *TE[:1]), REFUSED, 0, 2),
}


def keys_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
    save_file(tensors, path, metadata)
    return read_keys(path, read_header(path))


@pytest.mark.parametrize("name", CASES)
def test_diffusers_does_what_is_said(pipeline, tmp_path, name):
    tensors, loads, layers, told = CASES[name]
    metadata = METADATA if "metadata" in name else {}
    verdict = verdicts(keys_of(tmp_path / "a.safetensors", tensors, metadata))["diffusers"]
    assert verdict["loads"] == loads
    assert len({key for note in verdict["notes"] if note["effect"] == loads for key in note["keys"]}) == told
    try:
        pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
        found = dict(live(pipeline))
        wrong = [path for path, layer in found.items() if layer.scaling["default_0"] != wanted_scale(path, tensors)]
        assert bool(wrong) == (loads == CHANGED and "alpha" in name)
        assert len(found) == layers
    except (ValueError, KeyError):
        assert loads == REFUSED
    else:
        assert loads != REFUSED
    finally:
        pipeline.unload_lora_weights()


def live(pipeline) -> Any:
    for path, part in pipeline.unet.named_modules():
        if isinstance(part, LoraLayer):
            yield path, part
    for path, part in pipeline.text_encoder.named_modules():
        if isinstance(part, LoraLayer):
            yield canonical_text_name(path), part


def wanted_scale(path: str, tensors: dict[str, Tensor]) -> float:
    name = ("lora_te_" if path.startswith("text_model") else "lora_unet_") + path.replace(".", "_")
    return float(tensors.get(f"{name}.alpha", torch.tensor(2.0))) / 2


def test_what_the_others_do(tmp_path):
    def loads(reader: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
        return verdicts(keys_of(tmp_path / "a.safetensors", tensors, metadata or {}))[reader]["loads"]

    for reader in ("A1111/Forge", "ComfyUI", "sd-scripts"):
        assert loads(reader, kohya(Q)) == WHOLE
        assert loads(reader, peft(Q)) == UNKNOWN
        assert loads(reader, CASES["LoHa"][0]) == UNKNOWN
        assert loads(reader, CASES["a foreign key"][0]) == UNKNOWN
    assert loads("sd-scripts", CASES["cloneofsimo"][0]) == REFUSED
    sdxl = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert loads("ComfyUI", kohya(Q), sdxl) == UNKNOWN
    assert loads("sd-scripts", kohya(Q), sdxl) == WHOLE
    assert loads("peft", CASES["a peft adapter"][0]) == WHOLE
    assert loads("peft", peft(Q)) == REFUSED


def test_diffusers_leaves_out_one_of_two_namings(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    both = {**kohya(Q), **kohya("input_blocks.4.1.proj_in"), **kohya("middle_block.1.proj_in")}
    verdict = verdicts(keys_of(tmp_path / "a.safetensors", both, {}))["diffusers"]
    left = _maybe_map_sgm_blocks_to_diffusers(dict(both), None)
    assert verdict["loads"] == PART
    assert set(verdict["notes"][0]["keys"]) == both.keys() - left.keys()


def test_every_rule_applies_to_some_file_here(tmp_path):
    from loratune.lora.readers import RULES

    files = [(tensors, METADATA if "metadata" in name else {}) for name, (tensors, *_) in CASES.items()]
    files += [(kohya(Q), {"ss_base_model_version": "sdxl_base_v1-0"}), (kohya(Q, "middle_block.1.proj_in"), {})]
    found = [keys_of(tmp_path / "a.safetensors", tensors, metadata) for tensors, metadata in files]
    assert not [rule.told for rule in RULES if not any(rule.keys(keys) for keys in found)]
    assert all(reader in READS for rule in RULES for reader in rule.readers)
