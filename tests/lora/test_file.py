"""LoRA files: there and back bit for bit, real files' keys, and what diffusers makes of ours."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.architectures import architectures, module_names
from loratune.families.layout_text import canonical_text_name
from loratune.formats.files import read_header, read_tensors
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.metadata import standard_metadata, tag_frequency
from loratune.lora.names import known_shapes
from loratune.lora.tables.known import detect_format
from loratune.lora.tables.kohya import kohya_names

DATA = Path(__file__).parent.parent / "headers"
SD15 = module_names(architectures()["sd15"])
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ALPHAS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 8.0, 7.3, 1e-3, -2.0, 100.0])


def layer(rank: int, inner: int, outer: int, alpha: float, dtype=torch.float32, kernel: int = 0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sides = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    down = torch.randn(rank, inner, *sides[0], generator=generator).to(dtype)
    return LoRALayer(down, torch.randn(outer, rank, *sides[1], generator=generator).to(dtype), alpha)


@st.composite
def files(draw, uniform: bool) -> LoRAFile:
    names = draw(st.lists(st.sampled_from(SD15), min_size=1, max_size=6, unique=True))
    if any(name.startswith("text_encoder") for name in names):
        names = {*names, f"{TEXT}.out_proj"}
    dtype, alpha = draw(DTYPES), draw(ALPHAS)
    layers = {}
    for seed, name in enumerate(sorted(names)):
        size = [draw(st.integers(1, 5)) for _ in range(3)]
        own = alpha if uniform else draw(ALPHAS)
        layers[name] = layer(*size, own, dtype, draw(st.sampled_from([0, 1, 3])), seed)
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return LoRAFile(
        layers, draw(st.dictionaries(texts.filter(lambda key: key not in ("format", "__metadata__")), texts))
    )


@QUICK
@given(files(uniform=False))
def test_peft_there_and_back_is_the_same_bit_for_bit(tmp_path, lora):
    write_lora(tmp_path / "a.safetensors", lora)
    assert read_lora(tmp_path / "a.safetensors") == lora


@QUICK
@given(files(uniform=True))
def test_kohya_there_and_back_is_the_same_bit_for_bit(tmp_path, lora):
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    assert read_lora(tmp_path / "a.safetensors") == lora


@QUICK
@given(files(uniform=False), st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), min_size=7, max_size=7))
def test_kohya_folds_alphas_without_changing_what_a_layer_adds(tmp_path, lora, alphas):
    held = {
        name: LoRALayer(part.down, part.up, alpha)
        for (name, part), alpha in zip(lora.layers.items(), alphas, strict=False)
    }
    assume(any(part.alpha != part.rank for part in held.values()))  # else alpha = r is written, without an entry
    write_lora(tmp_path / "a.safetensors", LoRAFile(held), "kohya")
    back = read_lora(tmp_path / "a.safetensors")
    assert len({part.alpha for part in back.layers.values()}) == 1
    for name, part in held.items():  # ranks stay, so alpha B and A say all; products of float32 depend on alignment
        found = back.layers[name]
        assert torch.equal(found.down, part.down)
        assert torch.equal(found.alpha * found.up.double(), part.alpha * part.up.double())


def test_what_a_layer_adds_is_the_formula_of_the_paper():
    part = layer(3, 4, 5, 1.5)
    torch.testing.assert_close(part.matrix(), 0.5 * part.up @ part.down)
    assert (part.rank, part.scale) == (3, 0.5)
    conv = layer(3, 4, 5, 1.5, torch.float16, kernel=3)
    images = torch.randn(2, 4, 6, 6)
    inside = torch.nn.functional.conv2d(images, conv.down.float(), padding=1)
    expected = 0.5 * torch.nn.functional.conv2d(inside, conv.up.float())
    found = torch.nn.functional.conv2d(images, conv.matrix().reshape(conv.up.shape[0], *conv.down.shape[1:]), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert conv.matrix().dtype == torch.float32


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 3), (4, 3)), ((2, 3), (4, 2, 1, 1)), ((2, 3, 1, 1), (4, 2, 3, 3)), ((2,), (2,)), ((0, 3), (4, 0))],
)
def test_shapes_that_do_not_fit_are_refused(down, up):
    with pytest.raises(ValueError, match="down"):
        LoRALayer(torch.ones(down), torch.ones(up), 1.0)


def test_layers_are_the_same_only_bit_for_bit():
    part = layer(2, 3, 4, 1.0)
    assert part == layer(2, 3, 4, 1.0)
    assert part != 3
    assert part != layer(2, 3, 4, 2.0)
    assert part != layer(2, 3, 4, 1.0, torch.float16)
    assert part != layer(2, 3, 5, 1.0)


@pytest.mark.parametrize(
    ("name", "modules", "counts"),
    [
        ("sd15_lora_attn_r16", 176, {"unet": 128, "text_encoder": 48}),
        ("sd15_lora_default_r16", 264, {"unet": 192, "text_encoder": 72}),
        ("sdxl_lora_attn_r16", 736, {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}),
        ("sdxl_lora_default_r16", 986, {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_every_key_of_a_real_file_maps_and_is_written_again(tmp_path, name, modules, counts):
    raw = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    metadata = raw.pop("__metadata__")
    kinds = {"F16": torch.float16, "F32": torch.float32}
    tensors = {key: torch.zeros(shape, dtype=kinds[kind]) + 8 for key, (kind, *shape) in raw.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    lora = read_lora(tmp_path / "a.safetensors")
    assert len(lora.layers) == modules
    assert Counter(key.partition(".")[0] for key in lora.layers) == counts
    assert lora.metadata == metadata
    assert all(known_shapes()[name[:4]][key] in (shape_of(part),) for key, part in lora.layers.items())
    write_lora(tmp_path / "b.safetensors", lora, "kohya")
    header = read_header(tmp_path / "b.safetensors")
    assert {key: [info.dtype, *info.shape] for key, info in header.tensors.items()} == raw


def shape_of(part: LoRALayer) -> tuple[int, ...]:
    return (part.up.shape[0], *part.down.shape[1:])


TINY_UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
}
TINY_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 12,
}
TINY_NAMES = module_names({"unet": TINY_UNET, "text_encoder": TINY_TEXT})


@pytest.fixture
def pipeline(tmp_path):
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnop", *(f"{letter}</w>" for letter in "abcdefghijklmnop")]
    words = {word: index for index, word in enumerate([*letters, "ab", "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    vae = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TINY_TEXT)).double().eval(),
        tokenizer=CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
        unet=UNet2DConditionModel(**TINY_UNET).double().eval(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parts_of(pipeline) -> dict[str, torch.nn.Module]:
    """Modules by canonical name, live ones and those of peft alike."""
    found = {f"unet.{name}": part for name, part in pipeline.unet.named_modules()}
    for name, part in pipeline.text_encoder.named_modules():
        found[f"text_encoder.{canonical_text_name(name)}"] = part
    return found


def for_pipeline(pipeline, names, size) -> LoRAFile:
    """Layers that fit; `size` gives rank and alpha by the place in the list."""
    layers = {}
    for seed, name in enumerate(names):
        weight = parts_of(pipeline)[name].weight
        kernel = weight.shape[2] if weight.dim() == 4 else 0
        rank, alpha = size(seed)
        part = layer(rank, weight.shape[1], weight.shape[0], alpha, kernel=kernel, seed=seed)
        layers[name] = LoRALayer(part.down, part.up / 32, alpha)  # as small as a trained one's
    return LoRAFile(layers)


@torch.no_grad()
def outputs(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, words = (torch.randn(shape, generator=generator).double() for shape in ((1, 4, 8, 8), (1, 5, 8)))
    image = pipeline.unet(image, 7, encoder_hidden_states=words).sample
    return image, pipeline.text_encoder(torch.tensor([[1, 2, 3]])).last_hidden_state


@torch.no_grad()
def add(pipeline, lora: LoRAFile) -> None:
    for name, part in lora.layers.items():
        parts_of(pipeline)[name].weight += part.matrix().double().view_as(parts_of(pipeline)[name].weight)


def check_in_diffusers(pipeline, lora: LoRAFile, path: Path, padded: bool = False) -> None:
    """diffusers reads the file into as many layers as there are, each adding what ours adds."""
    before = outputs(pipeline)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    live = {name: part for name, part in parts_of(pipeline).items() if isinstance(part, LoraLayer)}
    assert live.keys() == lora.layers.keys() or (padded and live.keys() > lora.layers.keys())
    for name in live.keys() - lora.layers.keys():
        assert not live[name].get_delta_weight("default_0").any()
    for name, part in lora.layers.items():
        found = live[name].get_delta_weight("default_0").float()
        torch.testing.assert_close(found, part.matrix().view_as(found), rtol=1e-5, atol=1e-6, msg=name)
    loaded = outputs(pipeline)
    pipeline.unload_lora_weights()
    add(pipeline, lora)
    for old, with_file, with_sum in zip(before, loaded, outputs(pipeline), strict=True):
        torch.testing.assert_close(with_file, with_sum, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(old, with_sum, atol=1e-3)


PIPELINE_NAMES = [name for name in TINY_NAMES if "attn" in name or "ff." in name or "mlp" in name or "proj_" in name]


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize(
    "size",
    [lambda i: (4, 2.0), lambda i: (1 + i % 3, 1.0), lambda i: (1 + i % 3, float(2 ** (i % 4)))],
    ids=["one alpha", "mixed ranks (trap 7)", "mixed alphas (trap 1)"],
)
def test_diffusers_adds_what_we_add(pipeline, tmp_path, format, size):
    names = PIPELINE_NAMES if format == "peft" else [*PIPELINE_NAMES, *(n for n in TINY_NAMES if ".resnets." in n)]
    lora = for_pipeline(pipeline, names, size)
    write_lora(tmp_path / "a.safetensors", lora, format)
    assert read_lora(tmp_path / "a.safetensors", TINY_NAMES).layers.keys() == lora.layers.keys()
    check_in_diffusers(pipeline, lora, tmp_path / "a.safetensors")


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_alpha_r_with_mixed_ranks_is_scale_one_everywhere(pipeline, tmp_path, format):
    lora = for_pipeline(pipeline, PIPELINE_NAMES, lambda i: (3 + i % 3, float(3 + i % 3)))
    write_lora(tmp_path / "a.safetensors", lora, format)
    check_in_diffusers(pipeline, lora, tmp_path / "a.safetensors")


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("ends", [("q_proj", "k_proj", "v_proj"), ("q_proj", "fc1"), ("fc1",), ("fc2",), ("out_proj",)])
def test_any_part_of_a_text_encoder_is_read_whole_by_diffusers(pipeline, tmp_path, format, ends):
    """Trap 2: without out_proj it refuses kohya's q, k, v, or leaves them out; a layer of zeros helps."""
    names = [name for name in TINY_NAMES if name.endswith(ends)]
    lora = for_pipeline(pipeline, [*names, f"{BLOCK}.attn2.to_q"], lambda i: (1 + i % 2, 1.0))
    write_lora(tmp_path / "a.safetensors", lora, format)
    assert read_lora(tmp_path / "a.safetensors", TINY_NAMES) == lora
    check_in_diffusers(pipeline, lora, tmp_path / "a.safetensors", padded=True)


def test_alphas_that_cannot_be_folded_exactly_are_refused(tmp_path):
    layers = {f"{BLOCK}.attn2.to_{part}": layer(2, 3, 4, alpha) for part, alpha in (("q", 1.0), ("k", 0.3))}
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"the alphas differ \(0.3, 1\).*write format peft"):
        write_lora(path, LoRAFile(layers), "kohya")
    assert not list(tmp_path.iterdir())
    write_lora(path, LoRAFile(layers), "kohya", torch.float32)  # whoever names a dtype takes its rounding
    back = read_lora(path).layers
    assert {part.alpha for part in back.values()} == {0.3}
    for name, part in layers.items():
        torch.testing.assert_close(back[name].matrix(torch.float64), part.matrix(torch.float64), rtol=3e-7, atol=1e-7)


def test_alpha_is_exact_in_half_precision_too(tmp_path):
    for alpha, dtype in ((8.0, "F16"), (2049.0, "F32"), (0.1, "F64")):
        lora = LoRAFile({f"{BLOCK}.attn2.to_q": layer(2, 3, 4, alpha, torch.float16)})
        write_lora(tmp_path / "a.safetensors", lora, "kohya")
        (key,) = (key for key in read_header(tmp_path / "a.safetensors").tensors if key.endswith(".alpha"))
        assert read_header(tmp_path / "a.safetensors").tensors[key].dtype == dtype
        assert read_lora(tmp_path / "a.safetensors") == lora


def test_written_as_another_dtype(tmp_path):
    lora = LoRAFile({f"{BLOCK}.attn2.to_q": layer(2, 3, 4, 0.3)})
    write_lora(tmp_path / "a.safetensors", lora, dtype=torch.bfloat16)
    back = read_lora(tmp_path / "a.safetensors").layers[f"{BLOCK}.attn2.to_q"]
    assert back == LoRALayer(*(x.bfloat16() for x in (back.down, back.up)), 0.3)
    large = LoRAFile({"unet.conv_in": LoRALayer(torch.full((1, 1), 1e6), torch.ones(1, 1), 1.0)})
    with pytest.raises(UserError, match=r"unet\.conv_in has values that are not finite in float16"):
        write_lora(tmp_path / "b.safetensors", large, dtype=torch.float16)


def test_what_cannot_be_written_is_told(tmp_path):
    path, part = tmp_path / "a.safetensors", layer(2, 3, 4, 1.0)
    with pytest.raises(UserError, match="no layer to write"):
        write_lora(path, LoRAFile({}))
    with pytest.raises(ValueError, match="must begin with one of"):
        write_lora(path, LoRAFile({"vae.conv_in": part}))
    with pytest.raises(ValueError, match="would both be lora_unet_a_b"):
        kohya_names(["unet.a.b", "unet.a_b"])


PAIR = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(4, 2)}
PEFT = {f"{BLOCK}.attn2.to_q.{key}": value for key, value in PAIR.items()}
KOHYA = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
    "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"x": torch.ones(1)}, "is it a LoRA"),
        ({**PEFT, "x": torch.ones(1)}, "'x' is not part of a peft LoRA"),
        ({**KOHYA, "bundle_emb.x": torch.ones(1)}, "an embedding bundled with a LoRA"),
        ({**KOHYA, "lora_unet_conv_in.dora_scale": torch.ones(1)}, r"the magnitude \(1,\) is neither"),
        ({**KOHYA, "lora_unet_conv_in.dora_scale": torch.ones(3, 1)}, r"the magnitude \(3, 1\) is neither"),
        ({**KOHYA, "lora_unet_conv_in.lokr_w1": torch.ones(1, 1)}, "parts of a LoKr and of a LoRA"),
        ({"unet.a.lora_magnitude_vector": torch.ones(1)}, "is it a LoRA"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, "has no w1_b tensor"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(1, 1)}, "a factor is missing"),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(1, 1, 1)}, "an OFT or BOFT"),
        ({"lora_unet_conv_in.on_input": torch.ones(1)}, "an IA3"),
        ({"lora_unet_conv_in.a1.weight": torch.ones(1, 1)}, "a GLoRA"),
        ({**KOHYA, "lora_unet_conv_out.diff": torch.ones(1, 1)}, "whole weights"),
        ({**KOHYA, "lora_unet_conv_norm_out.w_norm": torch.ones(1)}, "trained norms"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(1, 1)}, "a FLUX LoRA"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": torch.ones(1, 1)}, "a Stable Diffusion 3 LoRA"),
        ({"lora_unet_input_blocks_99_1_proj_in.alpha": torch.ones(1)}, "is it a LoRA"),
        ({"transformer.x_embedder.lora_A.weight": torch.ones(1)}, "a LoRA of a transformer"),
        ({"unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": torch.ones(1, 1)}, "has no up tensor"),
        ({"unet:0:up": torch.ones(1, 1), "unet:0:down": torch.ones(1, 1)}, r"layers \(1 of unet\) fit neither"),
        ({"unet:x:up": torch.ones(1, 1), "unet:x:down": torch.ones(1, 1)}, "'unet:x' is no layer's number"),
        ({f"base_model.model.x.{key}": value for key, value in PAIR.items()}, "no layer of the architectures"),
        (
            {key.replace("conv_in", "new"): value for key, value in KOHYA.items()},
            "'lora_unet_new', which is no layer",
        ),
        (
            {key.replace("unet.", "vae."): value for key, value in PEFT.items()},
            "'vae.*which is no layer of the arch",
        ),
        (dict(list(KOHYA.items())[:1]), "'lora_unet_conv_in': it has no up tensor; export"),
        (dict(list(PEFT.items())[1:]), "has no down tensor"),
        ({**PEFT, f"{BLOCK}.attn2.to_q.lora_B.weight": torch.ones(4, 3)}, r"down \(2, 3\) and up \(4, 3\)"),
        ({key: value.int() for key, value in PEFT.items()}, "a LoRA holds floating point numbers"),
        (
            {key: value / 0 for key, value in PEFT.items()},
            r"to_q\.lora_.\.weight' has values that are not finite",
        ),
        ({**KOHYA, "lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, "conv_in.alpha' has values"),
        ({**KOHYA, "lora_unet_conv_in.alpha": torch.ones(2)}, "conv_in.alpha' has shape"),
        ({**PEFT, f"{BLOCK}.attn2.to_q.lora_A.bias": torch.ones(2)}, "is not part of a peft LoRA"),
        (
            {
                key.replace("lora_unet_conv_in", f"lora_{prefix}_text_model_encoder_layers_0_mlp_fc1"): value
                for key, value in KOHYA.items()
                for prefix in ("te", "te1")
            },
            "is there twice, under two names",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, tensors, told):
    path = tmp_path / "a.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(UserError, match=told) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a table"),
        ("{}", r"says nothing of unet\.lora_alpha"),
        ('{"unet.lora_alpha": "x"}', "the alpha 'x'; it must be a number"),
        ('{"unet.lora_alpha": NaN}', "the alpha nan"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "must be a number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "must be a table"),
    ],
)
def test_wrong_adapter_metadata_is_told(tmp_path, metadata, told):
    save_file(PEFT, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=told):
        read_lora(tmp_path / "a.safetensors")


def test_peft_metadata_as_others_write_it(tmp_path):
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"^down_blocks.0": 9, "to_k": 3}}
    for extra, alpha in (
        ({}, 4.0),
        ({"unet.use_rslora": True}, 4 * 2**0.5),
        ({"unet.alpha_pattern": {"to_q": 3}}, 3.0),
    ):
        save_file(PEFT, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told | extra)})
        assert read_lora(tmp_path / "a.safetensors").layers[f"{BLOCK}.attn2.to_q"].alpha == alpha


def test_other_namings_are_read_as_canonical_names(tmp_path):
    down, up = PAIR.values()
    named = {
        f"{BLOCK}.attn2.to_q": f"{BLOCK}.attn2.to_q.lora.{{}}.weight",
        f"{TEXT}.q_proj": f"{TEXT}.q_proj.lora_linear_layer.{{}}.weight",
        f"{TEXT}.k_proj": "text_encoder.encoder.layers.0.self_attn.k_proj.lora.{}.weight",
    }
    tensors = {key.format("down"): down.clone() for key in named.values()}
    tensors |= {key.format("up"): up.clone() for key in named.values()}
    assert detect_format(tensors) == "diffusers"
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.layers == {name: LoRALayer(down, up, 2.0) for name in named}


def test_kohya_text_encoders_of_both_spellings(tmp_path):
    path = "text_model_encoder_layers_0_self_attn_q_proj"
    for prefix, component in (("te", "text_encoder"), ("te1", "text_encoder"), ("te2", "text_encoder_2")):
        tensors = {f"lora_{prefix}_{path}.lora_{side}.weight": torch.ones(1, 1) for side in ("down", "up")}
        save_file(tensors, tmp_path / "a.safetensors")
        name = f"{component}.text_model.encoder.layers.0.self_attn.q_proj"
        assert list(read_lora(tmp_path / "a.safetensors", [name]).layers) == [name]
        assert detect_format(tensors) == "kohya"
    unknown = {key.replace("layers_0", "layers_99"): value for key, value in tensors.items()}
    save_file(unknown, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is no layer of the architectures known here"):
        read_lora(tmp_path / "b.safetensors")


def test_no_key_of_a_peft_file_is_an_alpha(tmp_path):
    """diffusers refuses a file in which a key does not say lora."""
    write_lora(tmp_path / "a.safetensors", LoRAFile({f"{BLOCK}.attn2.to_q": layer(2, 3, 4, 1.0)}))
    assert all(".lora_" in key for key in read_tensors(tmp_path / "a.safetensors"))
    assert detect_format(["a", "b"]) is None


PIECES = [
    *(
        "unet.",
        "lora_unet_",
        "text_encoder.",
        "lora_te_",
        "conv_in",
        "encoder.x",
        ".lora_A.weight",
        ".lora_B.weight",
    ),
    *(".lora_down.weight", ".lora_up.weight", ".alpha", ".lora.down.weight", "", "."),
]


@QUICK
@given(st.data())
def test_no_file_does_more_than_raise_a_user_error(tmp_path, data):
    keys = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
    shapes = st.sampled_from([(), (1,), (1, 1), (2, 1), (1, 2), (0, 1), (1, 1, 1, 1), (2, 1, 1, 1)])
    kinds = st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16])
    drawn = data.draw(st.dictionaries(keys, st.tuples(shapes, kinds), max_size=4))
    assume("__metadata__" not in drawn)
    metadata = {"lora_adapter_metadata": data.draw(st.sampled_from(["", "1", '{"unet.lora_alpha": null}', "null"]))}
    tensors = {key: torch.ones(shape).to(kind) for key, (shape, kind) in drawn.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata if data.draw(st.booleans()) else None)
    told = ""
    try:
        read_lora(tmp_path / "a.safetensors")
    except UserError as error:
        told = str(error)
    assert "\n" not in told


def test_standard_metadata_leaves_out_what_is_not_known():
    assert standard_metadata(rank=8, alpha=4.0, name="ink", title="Ink") == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4",
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "ink",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Ink",
    }
    told = standard_metadata(
        architecture="stable-diffusion-xl-v1-base/lora", resolution=1024, prediction="v", date="2024-01-02T03:04:05"
    )
    assert told["modelspec.resolution"] == "1024x1024"
    assert told["modelspec.prediction_type"] == "v"
    assert told["modelspec.date"] == "2024-01-02T03:04:05"
    assert told["modelspec.implementation"].endswith("generative-models")
    assert json.loads(tag_frequency({"ink": ["a, b", "b,", "a dog,b"]})) == {"ink": {"b": 3, "a": 1, "a dog": 1}}
    assert standard_metadata(alpha=0.5)["ss_network_alpha"] == "0.5"
    assert "ss_network_dim" not in standard_metadata()
    assert "modelspec.title" not in standard_metadata()
