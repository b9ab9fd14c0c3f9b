"""Every LoRA format but the plain two: there and back, as others wrote them, and what cannot be held."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes

from loratune.errors import UserError
from loratune.families.architectures import architectures, module_names
from loratune.formats.headers import read_header
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.keys import describe_keys
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.names import base_kind, flat, known_shapes
from loratune.lora.tables.known import TABLES, inverted, known_names
from loratune.lora.tables.table import MAGNITUDE, Part

NAMES = {family: module_names(architectures()[family]) for family in ("sd15", "sd2", "sdxl")}
BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
ALPHAS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 8.0, 7.3, 1e-3, -2.0, 0.0, 100.0])


def tensors_of(seed: int, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@st.composite
def lora_layers(draw, dtype: torch.dtype, alpha: float, seed: int) -> LowRank:
    """A layer of any kind, small."""
    r, inner, outer = (draw(st.integers(1, 4)) for _ in range(3))
    kind = draw(st.sampled_from(["linear", "conv", "mid", "loha", "loha conv", "loha mid", "lokr", "lokr whole"]))
    w1 = {"w1": (2, 1)} if draw(st.booleans()) else {"w1_a": (2, r), "w1_b": (r, 1)}
    shapes = {
        "linear": {"down": (r, inner), "up": (outer, r)},
        "conv": {"down": (r, inner, 3, 3), "up": (outer, r, 1, 1)},
        "mid": {"down": (r, inner, 1, 1), "up": (outer, r, 1, 1), "mid": (r, r, 3, 3)},
        "loha": {"w1_a": (outer, r), "w1_b": (r, inner), "w2_a": (outer, r), "w2_b": (r, inner)},
        "loha conv": {"w1_a": (outer, r), "w1_b": (r, inner * 9), "w2_a": (outer, r), "w2_b": (r, inner * 9)},
        "loha mid": {"w1_a": (r, outer), "w1_b": (r, inner), "w2_a": (r, outer), "w2_b": (r, inner)}
        | {"t1": (r, r, 3, 3), "t2": (r, r, 3, 3)},
        "lokr": {**w1, "w2_a": (outer, r), "w2_b": (r, inner)},
        "lokr whole": {"w1": (1, 2), "w2": (outer, inner, 3, 3)},
    }[kind]
    made = LoHaLayer if "loha" in kind else LoKrLayer if "lokr" in kind else LoRALayer
    layer = made(**tensors_of(seed, dtype, **shapes), alpha=alpha)
    outer, inner = layer.flat_shape
    dimensions = 4 if kind in ("conv", "mid", "loha conv", "loha mid", "lokr whole") else 2
    axis = draw(st.sampled_from(["none", "none", "out", "in"]))
    if axis == "none":
        return layer
    inner = inner // 9 if dimensions == 4 else inner
    m = torch.rand((outer, 1) if axis == "out" else (1, inner), generator=torch.Generator().manual_seed(seed)) + 0.1
    return made(**{**vars(layer), "magnitude": m.to(dtype).reshape(*m.shape, *[1] * (dimensions - 2))})


@st.composite
def files(draw, plain: bool = False) -> LoRAFile:
    family = draw(st.sampled_from(sorted(NAMES)))
    names = draw(st.lists(st.sampled_from(NAMES[family]), min_size=1, max_size=6, unique=True))
    dtype, alpha = draw(DTYPES), draw(ALPHAS)
    layers: dict[str, LowRank] = {}
    for seed, name in enumerate(names):
        made = draw(lora_layers(dtype, alpha if plain else draw(ALPHAS), seed))
        layers[name] = made if not plain else LoRALayer(**tensors_of(seed, dtype, down=(2, 3), up=(4, 2)), alpha=alpha)
    told = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    return LoRAFile(layers, {"ss_base_model_version": told} if draw(st.booleans()) else {})


@QUICK
@given(files())
def test_every_kind_there_and_back_in_kohyas_names(tmp_path, lora):
    if all(isinstance(part, LoRALayer) for part in lora.layers.values()):
        lora.layers[f"{BLOCK}.ff.net.2"] = LoKrLayer(1.0, w1=torch.ones(1, 1), w2=torch.ones(2, 2))  # nothing folded
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    assert read_lora(tmp_path / "a.safetensors") == lora


@QUICK
@given(files(plain=True), st.sampled_from(["kohya", "peft"]))
def test_every_family_there_and_back(tmp_path, lora, format):
    write_lora(tmp_path / "a.safetensors", lora, format)
    back = read_lora(tmp_path / "a.safetensors")
    assert back == lora
    described = describe_keys(read_header(tmp_path / "a.safetensors"))
    assert (described.format, described.foreign, described.damaged) == (format, {}, {})
    for name, part in lora.layers.items():
        keys = described.layers[name]
        assert (keys.kinds, keys.entries.rank, keys.entries.flat_shape) == (["LoRA"], part.rank, part.flat_shape)
        assert not keys.dora


@QUICK
@given(st.data())
def test_peft_holds_doras_of_outputs(tmp_path, data):
    dtype, alpha = data.draw(DTYPES), data.draw(ALPHAS)
    linear = LoRALayer(**tensors_of(1, dtype, down=(2, 3), up=(4, 2), magnitude=(4, 1)), alpha=alpha)
    conv = LoRALayer(**tensors_of(2, dtype, down=(1, 3, 3, 3), up=(2, 1, 1, 1), magnitude=(2, 1, 1, 1)), alpha=8.0)
    plain = LoRALayer(**tensors_of(3, dtype, down=(2, 3), up=(3, 2)), alpha=1.0)
    lora = LoRAFile({f"{BLOCK}.attn1.to_q": linear, "unet.conv_in": conv, f"{TEXT}.q_proj": plain})
    write_lora(tmp_path / "a.safetensors", lora)
    assert read_lora(tmp_path / "a.safetensors") == lora
    told = json.loads(read_header(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert told["unet.use_dora"] is True
    assert "text_encoder.use_dora" not in told
    shapes = {key: info.shape for key, info in read_header(tmp_path / "a.safetensors").tensors.items()}
    assert shapes["unet.conv_in.lora_magnitude_vector.weight"] == (1, 2, 1, 1)
    assert shapes[f"{BLOCK}.attn1.to_q.lora_magnitude_vector.weight"] == (4,)


def test_the_header_alone_tells_of_every_kind(tmp_path):
    layers = {
        "unet.conv_in": LoHaLayer(
            **tensors_of(1, torch.float32, w1_a=(4, 2), w1_b=(2, 27), w2_a=(4, 2), w2_b=(2, 27)), alpha=1.0
        ),
        "unet.conv_out": LoRALayer(
            **tensors_of(1, torch.float32, down=(3, 5, 1, 1), up=(4, 3, 1, 1), mid=(3, 3, 3, 3)), alpha=1.0
        ),
        f"{BLOCK}.attn1.to_q": LoKrLayer(
            **tensors_of(1, torch.float32, w1=(2, 2), w2_a=(3, 2), w2_b=(2, 3)), alpha=1.0
        ),
        f"{BLOCK}.attn1.to_k": LoKrLayer(
            **tensors_of(1, torch.float32, w1=(2, 2), w2_a=(2, 3), w2_b=(2, 3), t2=(2, 2, 3, 3)), alpha=1.0
        ),
        f"{BLOCK}.attn1.to_v": LoKrLayer(
            **tensors_of(1, torch.float32, w1=(2, 2), w2=(3, 3), magnitude=(6, 1)), alpha=1.0
        ),
    }
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers), "kohya")
    described = describe_keys(read_header(tmp_path / "a.safetensors"))
    assert {name: keys.kind for name, keys in described.layers.items()} == {n: type(part) for n, part in layers.items()}
    assert {name: keys.entries.flat_shape for name, keys in described.layers.items()} == {
        name: part.flat_shape for name, part in layers.items()
    }
    assert [described.layers[name].entries.rank for name in layers] == [2, 3, 2, 2, 1]
    assert [described.layers[name].entries.ranked for name in layers] == [True] * 4 + [False]
    assert [described.layers[name].dora for name in layers] == [False] * 4 + [True]


def test_keys_that_do_not_map_are_told_each(tmp_path):
    plain = tensors_of(1, torch.float32, down=(2, 3), up=(4, 2))
    tensors = {
        f"lora_unet_{name}.lora_{side}.weight": value.clone()
        for name in ("conv_in", "new")
        for side, value in plain.items()
    }
    save_file({**tensors, "x": torch.ones(1)}, tmp_path / "a.safetensors")
    described = describe_keys(read_header(tmp_path / "a.safetensors"))
    assert list(described.layers) == ["unet.conv_in"]
    assert sorted(described.foreign) == ["lora_unet_new.lora_down.weight", "x"]


def test_tables_are_read_without_torch():
    code = "import sys; from loratune.lora import keys, metadata; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("format", ["kohya", "peft", "diffusers"])
def test_no_name_of_a_layer_stands_for_two(format):
    names = known_names(TABLES[format])
    assert all(len(found) == 1 for found in names.values())
    assert {found[0] for found in names.values()} == {name for names in NAMES.values() for name in names}


def test_the_first_ending_of_a_part_is_written():
    assert TABLES["peft"].suffix(MAGNITUDE) == ".lora_magnitude_vector.weight"
    assert TABLES["kohya"].suffix(Part("LoHa", "t1")) == ".hada_t1"
    assert inverted(TABLES["old diffusers"], ["unet.conv_in"]) == {}


def test_which_base_a_lora_is_for():
    shapes = {family: {name: flat(shape) for name, shape in known_shapes()[family].items()} for family in NAMES}
    query, cross = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"
    assert base_kind({cross: shapes["sdxl"][cross]}) == "sdxl"
    assert base_kind({cross: shapes["sd15"][cross]}) == "sd"
    assert base_kind({query: (1, 1)}) == "sd"
    assert base_kind({query: (1, 1)}, "sdxl_base_v1-0") == "sdxl"
    assert base_kind({f"{TEXT}.q_proj": (768, 768)}, "stable-diffusion-xl-v1-base/lora") == "sdxl"
    assert base_kind({f"{TEXT}.q_proj": (768, 768)}) == "sd"
    assert base_kind({f"{TEXT}.q_proj".replace("encoder.", "encoder_2.", 1): (1, 1)}) == "sdxl"
    assert base_kind({"unet.down_blocks.0.attentions.0.proj_in": (1, 1)}, "sdxl") == "sd"
    assert base_kind({"unet.new": (1, 1)}, "sdxl") == "sd"


def test_sdxl_is_written_with_the_original_names_and_read_with_both(tmp_path):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = LoRALayer(**tensors_of(1, torch.float32, down=(2, 2048), up=(640, 2)), alpha=2.0)
    write_lora(tmp_path / "a.safetensors", LoRAFile({name: layer}), "kohya")
    raw = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == {raw}
    other = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
    renamed = {key.replace(raw, other): value for key, value in load_file(tmp_path / "a.safetensors").items()}
    save_file(renamed, tmp_path / "b.safetensors")
    assert read_lora(tmp_path / "b.safetensors").layers == {name: layer}
    odd = {name: layer, "unet.down_blocks.7.conv": layer}  # no layer of SDXL: never some names of both kinds
    write_lora(tmp_path / "c.safetensors", LoRAFile({**odd, f"text_encoder_2.{TEXT[13:]}.out_proj": layer}), "kohya")
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "c.safetensors")}
    assert {other, "lora_unet_down_blocks_7_conv", "lora_te2_text_model_encoder_layers_0_self_attn_out_proj"} == keys


PAIR = {"down": torch.ones(2, 3), "up": torch.ones(4, 2)}
OLD = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": f"{BLOCK}.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora": f"{BLOCK}.attn2.to_out.0",
}
OLD_TEXT = {
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": f"{TEXT}.q_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora": f"{TEXT}.out_proj",
}


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_attention_processors_of_2023(tmp_path, prefix):
    named = {f"{prefix}{raw}": name for raw, name in OLD.items()} | OLD_TEXT
    save_file(
        {f"{raw}.{side}.weight": v.clone() for raw in named for side, v in PAIR.items()}, tmp_path / "a.safetensors"
    )
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.layers == {name: LoRALayer(**PAIR, alpha=2.0) for name in named.values()}
    assert describe_keys(read_header(tmp_path / "a.safetensors")).format == "old diffusers"


def adapter(names: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, shape[1]) for name, shape in names.items()}
    return tensors | {f"base_model.model.{n}.lora_B.weight": torch.ones(shape[0], 4) for n, shape in names.items()}


@pytest.mark.parametrize(
    ("path", "shape", "name"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (640, 640), f"{BLOCK}.attn1.to_q"),
        (f"{BLOCK}.attn1.to_q", (1, 1), f"{BLOCK}.attn1.to_q"),
        ("text_model.encoder.layers.0.self_attn.q_proj", (768, 768), f"{TEXT}.q_proj"),
        ("encoder.layers.0.self_attn.q_proj", (1280, 1280), f"{TEXT}.q_proj".replace("encoder.", "encoder_2.", 1)),
        ("encoder.layers.30.self_attn.q_proj", (1, 1), "text_encoder_2.text_model.encoder.layers.30.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"r": 4, "lora_alpha": 2}, 2.0),
        ({"lora_alpha": 2, "use_rslora": True}, 4.0),
        ({"lora_alpha": 2, "alpha_pattern": {"q_proj": 3, "to_q": 3}}, 3.0),
    ],
)
def test_adapters_of_peft(tmp_path, path, shape, name, config, alpha):
    save_file(adapter({path: shape}), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"alpha is in adapter_config.json"):
        read_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert list(lora.layers) == [name]
    assert lora.layers[name].alpha == alpha


def test_an_adapter_that_could_be_of_two_text_encoders_is_refused(tmp_path):
    save_file(adapter({"encoder.layers.0.self_attn.q_proj": (8, 8)}), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="whether it is of text_encoder or text_encoder_2"):
        read_lora(tmp_path / "adapter_model.safetensors")
    given = {f"{TEXT}.q_proj"}  # a base with one text encoder
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')
    assert list(read_lora(tmp_path / "adapter_model.safetensors", given).layers) == [f"{TEXT}.q_proj"]
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1, "alpha_pattern": {".*q_(proj|x)": 3}}')
    assert read_lora(tmp_path / "adapter_model.safetensors", given).layers[f"{TEXT}.q_proj"].alpha == 3
    for pattern in ("(a|a)*q", "(a+)+$", ".*.*.*q", "(", "a{9999999999}"):
        config = json.dumps({"lora_alpha": 1, "alpha_pattern": {pattern: 3}})
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(UserError, match="the regular expression"):
            read_lora(tmp_path / "adapter_model.safetensors", given)


def first_format(
    family: str, order: str, classes: list[str] | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """cloneofsimo's file for the U-Net, written from torch's traversal as that diffusers had it, and the layers."""
    shapes = known_shapes()[family]
    blocks = [f"down_blocks.{i}" for i in range(3)] + [f"up_blocks.{i}" for i in (1, 2, 3)] + ["mid_block"]
    names = []
    for block in blocks:
        for index in range(3 if block.startswith("up") else 1 if block == "mid_block" else 2):
            inside = f"unet.{block}.attentions.{index}.transformer_blocks.0"
            attn1, attn2 = (
                [f"{inside}.{attention}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
                for attention in ("attn1", "attn2")
            )
            middle = [f"{inside}.ff.net.0.proj"]
            names += [*attn1, *middle, *attn2] if order == "first" else [*attn1, *attn2, *middle]
    tensors = {}
    for index, name in enumerate(names):
        tensors[f"unet:{index}:up"] = torch.full((shapes[name][0], 1), float(index))
        tensors[f"unet:{index}:down"] = torch.ones(1, shapes[name][1])
    return tensors, names


TOLD = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "unet:0:rank": "1"}


@pytest.mark.parametrize(("family", "order"), [("sd15", "first"), ("sd15", "later"), ("sd2", "first")])
def test_the_first_format_numbers_layers(tmp_path, family, order):
    tensors, names = first_format(family, order)
    save_file(tensors, tmp_path / "a.safetensors", TOLD)
    lora = read_lora(tmp_path / "a.safetensors")
    assert len(lora.layers) == 144
    assert [float(lora.layers[name].up[0, 0]) for name in names] == list(range(144))
    assert {part.alpha for part in lora.layers.values()} == {1.0}


def test_the_first_format_of_text_encoders_and_residual_blocks(tmp_path):
    parts = ("k_proj", "v_proj", "q_proj", "out_proj")
    text = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.{part}" for i in range(12) for part in parts]
    tensors = {f"text_encoder:{i}:up": torch.full((768, 1), float(i)) for i in range(len(text))}
    tensors |= {f"text_encoder:{i}:down": torch.ones(1, 768) for i in range(len(text))}
    shapes = known_shapes()["sd15"]
    blocks = [f"down_blocks.{i}.resnets.{j}" for i in range(4) for j in range(2)]
    blocks += [f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)]
    blocks += [f"mid_block.resnets.{j}" for j in range(2)]
    whole = [f"unet.{b}.{part}" for b in blocks for part in ("conv1", "time_emb_proj", "conv2", "conv_shortcut")]
    names = [name for name in whole if name in shapes]
    for index, name in enumerate(names):
        tail = (1, 1) if len(shapes[name]) == 4 else ()
        tensors[f"unet:{index}:up"] = torch.full((shapes[name][0], 1, *tail), float(index))
        tensors[f"unet:{index}:down"] = torch.ones(1, *shapes[name][1:])
    told = {"unet": '["ResnetBlock2D"]', "text_encoder": '["CLIPAttention"]'}
    save_file(tensors, tmp_path / "a.safetensors", told)
    lora = read_lora(tmp_path / "a.safetensors")
    assert [float(lora.layers[name].up.flatten()[0]) for name in names] == list(range(len(names)))
    assert [float(lora.layers[name].up[0, 0]) for name in text] == list(range(48))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"unet": '["Conv"]'}, "the class 'Conv', whose layers are not known"),
        ({"unet": "3"}, "is no list of classes"),
        ({"unet": '["GEGLU"]'}, "144 of unet. fit neither"),
    ],
)
def test_a_first_format_that_does_not_fit_is_told(tmp_path, metadata, told):
    save_file(first_format("sd15", "first")[0], tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=told):
        read_lora(tmp_path / "a.safetensors")


def test_learned_tokens_are_kept_apart_and_written_to_files_of_their_own(tmp_path, caplog):
    tensors, _ = first_format("sd15", "first")
    vectors = torch.randn(2, 768)
    save_file({**tensors, "<s1>": vectors}, tmp_path / "a.safetensors", {**TOLD, "<s1>": "<embed>"})
    lora = read_lora(tmp_path / "a.safetensors")
    assert "<s1>" in caplog.text
    assert torch.equal(lora.tokens["<s1>"], vectors)
    write_lora(tmp_path / "b.safetensors", lora, "kohya")
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "b.safetensors"))
    assert torch.equal(load_file(tmp_path / "b-s1.safetensors")["<s1>"], vectors)


REFUSED_BY_PEFT = {
    "is a LoHa": LoHaLayer(
        **tensors_of(1, torch.float32, w1_a=(4, 2), w1_b=(2, 3), w2_a=(4, 2), w2_b=(2, 3)), alpha=1.0
    ),
    "is a DoRA of LoKr": LoKrLayer(**tensors_of(1, torch.float32, w1=(2, 2), w2=(2, 2), magnitude=(4, 1)), alpha=1.0),
    "LoCon with a middle": LoRALayer(
        **tensors_of(1, torch.float32, down=(2, 3, 1, 1), up=(4, 2, 1, 1), mid=(2, 2, 3, 3)), alpha=1.0
    ),
    "a DoRA with a norm for each input": LoRALayer(
        **tensors_of(1, torch.float32, down=(2, 3), up=(4, 2), magnitude=(1, 3)), alpha=1.0
    ),
    "is a DoRA and .* is none": LoRALayer(
        **tensors_of(1, torch.float32, down=(2, 3), up=(4, 2), magnitude=(4, 1)), alpha=1.0
    ),
}


@pytest.mark.parametrize("told", REFUSED_BY_PEFT)
def test_what_peft_cannot_hold_is_refused_by_name(tmp_path, told):
    plain = LoRALayer(**tensors_of(1, torch.float32, down=(2, 3), up=(4, 2)), alpha=1.0)
    lora = LoRAFile({"unet.conv_in": REFUSED_BY_PEFT[told], "unet.conv_out": plain})
    with pytest.raises(UserError, match=rf"{told}.*--to kohya"):
        write_lora(tmp_path / "a.safetensors", lora, "peft")
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    assert read_lora(tmp_path / "a.safetensors") == lora


def test_the_hash_is_of_the_data_and_what_others_wrote_is_kept(tmp_path):
    layers = {
        name: LoRALayer(**tensors_of(1, torch.float16, down=(2, 3), up=(4, 2)), alpha=0.1) for name in NAMES["sd15"][:3]
    }
    told = {"ss_steps": "7", "theirs": "x"}
    stale = {"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0", "sshs_legacy_hash": "0"}
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers, {**told, **stale}), "kohya")
    header = read_header(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()[header.data_offset :]
    assert header.metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert "sshs_legacy_hash" not in header.metadata
    assert read_lora(tmp_path / "a.safetensors").metadata == told
    # sd-scripts hashes what the library makes of the tensors
    written = save_bytes(load_file(tmp_path / "a.safetensors"))
    theirs = written[8 + int.from_bytes(written[:8], "little") :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(theirs).hexdigest()


def test_values_that_are_not_finite_can_be_read_to_be_told(tmp_path):
    tensors = {f"lora_unet_conv_in.lora_{side}.weight": value / 0 for side, value in PAIR.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not finite"):
        read_lora(tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors", check_finite=False).layers["unet.conv_in"].up.isinf().all()


def test_ranks_that_differ_need_no_alphas(tmp_path: Path):
    """Nothing is folded then, so nothing can be rounded (trap 7)."""
    layers = {
        f"{BLOCK}.attn1.to_{part}": LoRALayer(
            **tensors_of(rank, torch.float32, down=(rank, 3), up=(4, rank)), alpha=float(rank)
        )
        for part, rank in (("q", 2), ("k", 4))
    }
    write_lora(tmp_path / "a.safetensors", LoRAFile(layers), "kohya")
    assert read_lora(tmp_path / "a.safetensors").layers == layers
    assert not any(key.endswith(".alpha") for key in load_file(tmp_path / "a.safetensors"))
