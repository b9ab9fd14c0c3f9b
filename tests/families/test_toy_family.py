"""A family in one file, which adds itself by one row: a flow-matching transformer with packed latents.

It is recognised from its file, trained, sampled, exported, merged, planned and inspected by what is there for all.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families import known
from loratune.families.architectures import entries
from loratune.families.autoencoder import LatentFamily
from loratune.families.base import Base
from loratune.families.conditions import stack_conditions
from loratune.families.family import Architecture, Condition, Part
from loratune.families.layout_vae import canonical_vae_key, vae_layers
from loratune.families.layouts import Config, Layer
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.families.processes import FlowFamily
from loratune.families.sampling import sample_images
from loratune.families.save import save_diffusers_folder, save_single_file
from loratune.formats.headers import read_header
from loratune.lora.load import load_with

# The family: its networks, its facts, its behaviour.


class Block(nn.Module):
    """Image tokens attend to themselves and to the caption's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        both = torch.cat([self.norm(x), text], 1)
        seen = None
        if mask is not None:
            seen = torch.cat([mask.new_ones(x.shape[:2]), mask], 1)[:, None]
        x = x + self.to_out(
            F.scaled_dot_product_attention(self.to_q(self.norm(x)), self.to_k(both), self.to_v(both), attn_mask=seen)
        )
        return x + self.mlp(F.gelu(x))


class ToyTransformer(ModelMixin, ConfigMixin):
    """Of packed latents (B, L, 4 C), sigma (B,) and a caption's states (B, S, d): the velocity, packed."""

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self, in_channels: int = 16, width: int = 8, text_width: int = 8, layers: int = 2, sample_size: int = 8
    ) -> None:
        super().__init__()
        self.embedder = nn.Linear(in_channels, width)
        self.time = nn.Linear(2, width)
        self.text = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.final = nn.Linear(width, in_channels)

    def forward(self, x: Tensor, sigma: Tensor, places: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        angle = math.pi * sigma[:, None]
        hidden = self.embedder(x) + self.time(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))[:, None]
        hidden = hidden + F.pad(places.to(x.dtype), (0, hidden.shape[-1] - 2))
        for block in self.blocks:
            hidden = block(hidden, self.text(text), mask)
        return self.final(hidden)


class ToyText(ModelMixin, ConfigMixin):
    """Bytes of a caption as vectors."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.mix = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.bytes(ids))


def transformer_layers(config: Config) -> Iterator[Layer]:
    """q, k and v are thirds of one tensor in the single file."""
    width = config["width"]
    yield Layer("embedder", "img_in", (width, config["in_channels"]))
    yield Layer("time", "time_in", (width, 2))
    yield Layer("text", "txt_in", (width, config["text_width"]))
    for index in range(config["layers"]):
        yield Layer(f"blocks.{index}.norm", f"stack.{index}.ln", (width,))
        for third, part in enumerate(("to_q", "to_k", "to_v")):
            yield Layer(f"blocks.{index}.{part}", f"stack.{index}.qkv", (width, width), third=third)
        yield Layer(f"blocks.{index}.to_out", f"stack.{index}.proj", (width, width))
        yield Layer(f"blocks.{index}.mlp", f"stack.{index}.mlp", (width, width))
    yield Layer("final", "final", (config["in_channels"], width))


def text_layers(config: Config) -> Iterator[Layer]:
    yield Layer("bytes", "bytes", (256, config["width"]), bias=False, table=True)
    yield Layer("mix", "mix", (config["width"], config["width"]))


class Toy(LatentFamily, FlowFamily):
    name = "toy"
    title = "Toy"
    parts = (
        Part("transformer", "denoiser", __name__, "ToyTransformer", "toy.", transformer_layers, block="transformer",
             blocks=(("blocks", "block"),), kohya=("lora_toy_",), shards=("Block",)),
        Part("vae", "vae", "diffusers", "AutoencoderKL", "decoder.", vae_layers, canonical=canonical_vae_key),
        Part("text_encoder", "text_encoder", __name__, "ToyText", "reader.", text_layers, block="te1",
             kohya=("lora_reader_",)),
    )  # fmt: skip
    pipeline = "ToyPipeline"
    targets = MappingProxyType({"attention": r".*\bto_(q|k|v|out)"})
    patch = 2

    def fits(self, configs: Mapping[str, Config]) -> bool:
        return "transformer" in configs

    def architectures(self) -> dict[str, dict[str, dict[str, Any]]]:
        return {"toy": CONFIGS}

    def image_size(self, configs: Mapping[str, Config]) -> tuple[int, int]:
        return 16, 16

    def modelspec(self, configs: Mapping[str, Config]) -> str:
        return "toy-1"

    def encode_prompts(self, model: Model, captions: Sequence[str]) -> Condition:
        ids = [torch.tensor(list(caption.encode()) or [0]) for caption in captions]
        both = stack_conditions([{"ids": one, "text_mask": torch.ones(len(one), dtype=torch.bool)} for one in ids])
        states = model.text_encoder(both["ids"].to(model.device)).float()
        return {"text": states, "text_mask": both["text_mask"].to(model.device)}

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        rows, columns = height // 2, width // 2
        packed = F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(x_t.device) / 8
        out = model.network(packed, t / 1000, places, condition["text"], condition["text_mask"])
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2).float()


class NewToy(Architecture):
    """A toy with new weights."""

    def build(self) -> Model:
        parts = {part.name: part.new(CONFIGS[part.name]) for part in Toy.parts}
        return Model(Toy(), parts, CONFIGS["scheduler"], source="new")


CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {"in_channels": 16, "width": 8, "text_width": 8, "layers": 2, "sample_size": 8},
    "vae": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
    },
    "text_encoder": {"width": 8},
    "scheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}

# The row.


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    known.FAMILIES.append(Toy())
    forget()
    yield
    known.FAMILIES.pop()
    forget()


def forget() -> None:
    """What was remembered of the families that are known."""
    for name, module in list(sys.modules.items()):
        if name.startswith("loratune."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


# What is shown.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = NewToy().build()
    save_diffusers_folder(model, tmp_path / "toy", torch.float32)
    return tmp_path / "toy"


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """A single file without our configurations in it."""
    save_single_file(load_model(str(folder)), tmp_path / "ours.safetensors", torch.float32)
    from loratune.formats.files import write_safetensors

    write_safetensors(tmp_path / "toy.safetensors", load_file(tmp_path / "ours.safetensors"), {})
    return tmp_path / "toy.safetensors"


RECIPE = """\
seed_everything: 3
trainer: {{default_root_dir: {out}, max_steps: 6, accelerator: cpu, precision: 32-true, enable_progress_bar: false}}
model:
  base: {base}
  lora: {{rank: 2, targets: attention}}
  objective: {{caption_dropout: 0.3}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
data:
  path: {data}
  resolution: 16
  buckets: {{step: 4, smallest: 8}}
  batch_size: 4
  validation_percent: 25
  cache_dir: {cache}
samples: {{every_n_steps: 3}}
evaluation: {{every_n_steps: 0, figures: true}}
export: {{format: {format}, dtype: float32}}
"""


def recipe(tmp_path: Path, base: Path, images: Path, format: str = "peft") -> Path:
    path = tmp_path / f"{format}.yaml"
    out, cache = tmp_path / f"run-{format}", tmp_path / "cache"
    path.write_text(RECIPE.format(out=out, base=base, data=images, cache=cache, format=format))
    return path


def test_it_is_recognised_from_its_file(file: Path, folder: Path) -> None:
    base = Base.open(str(file))
    assert base.title == "Toy"
    tensors = read_header(file).tensors
    assert tensors["toy.stack.0.qkv.weight"].shape == (24, 8)
    model, whole = load_model(str(file)), load_file(file)
    assert torch.equal(model.network.blocks[1].to_k.weight, whole["toy.stack.1.qkv.weight"][8:16])
    other = load_model(str(folder))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.prediction == "flow"
    assert len(list(entries(base.configs))) == sum(len(part.state_dict()) for part in model.components().values())


def test_captions_of_unequal_length_are_as_alone(folder: Path) -> None:
    model = load_model(str(folder)).eval()
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([300.0, 900.0])
    captions = ["a disc", "a much longer caption than the first"]
    with torch.no_grad():
        together = model.denoise(x, t, model.encode_prompts(captions))
        for row, caption in enumerate(captions):
            alone = model.denoise(x[row : row + 1], t[row : row + 1], model.encode_prompts([caption]))
            torch.testing.assert_close(together[row : row + 1], alone)


def test_it_is_sampled_at_a_height_unlike_its_width(folder: Path) -> None:
    model = load_model(str(folder)).eval()
    images = sample_images(model, ["a disc", "a long ring"], [0, 1], 16, 24, 4, 3.0)
    assert images.shape == (2, 3, 16, 24)
    assert torch.isfinite(images).all()
    with pytest.raises(UserError, match="multiple of 4"):
        sample_images(model, ["a disc"], [0], 16, 22, 4)
    with pytest.raises(UserError, match="sampler 'ddim' is not known for Toy; there is euler"):
        sample_images(model, ["a disc"], [0], 16, 24, 4, sampler="ddim")


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_it_is_trained_by_a_recipe_and_exported_and_merged(
    format: str, file: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", str(recipe(tmp_path, file, images, format))]) == 0
    run = tmp_path / f"run-{format}"
    lora = run / "lora.safetensors"
    begins = {"peft": "transformer.blocks.0.to_q.lora_A.weight", "kohya": "lora_toy_blocks_0_to_q.lora_down.weight"}
    header = read_header(lora)
    assert begins[format] in header.tensors
    assert header.metadata["modelspec.architecture"] == "toy-1/lora"
    assert len(list((run / "figures").glob("samples-*.png"))) == 2
    out = tmp_path / "merged.safetensors"
    capsys.readouterr()
    assert main(["merge", "--base", str(file), "--lora", str(lora), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["blocks"]) == {"block.0", "block.1"}
    assert report["layers"] == 8
    trained, merged = load_with(str(file), [str(lora)], "cpu"), load_model(str(out))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        wanted = trained.denoise(x, t, trained.encode_prompts(["a disc"]))
        torch.testing.assert_close(merged.denoise(x, t, merged.encode_prompts(["a disc"])), wanted)
        base = load_model(str(file))
        assert not torch.allclose(base.denoise(x, t, base.encode_prompts(["a disc"])), wanted)


def test_blocks_weigh_a_merge(file: Path, images: Path, tmp_path: Path) -> None:
    assert main(["fit", "-c", str(recipe(tmp_path, file, images)), "--samples.every_n_steps", "0"]) == 0
    lora, out = tmp_path / "run-peft" / "lora.safetensors", tmp_path / "merged.safetensors"
    assert main(["merge", "--base", str(file), "--lora", f"{lora}:1,block.0=0", "--out", str(out)]) == 0
    before, after = load_file(file), load_file(out)
    assert torch.equal(before["toy.stack.0.qkv.weight"], after["toy.stack.0.qkv.weight"])
    assert not torch.equal(before["toy.stack.1.qkv.weight"], after["toy.stack.1.qkv.weight"])


def test_it_is_planned_and_inspected(
    file: Path, folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe(tmp_path, file, images)), "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trained"] == 2 * 4 * 2 * (8 + 8)
    assert plan["memory"]["activations"] > 0
    for base in (file, folder):
        assert main(["inspect", str(base), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["family"] == "Toy"
