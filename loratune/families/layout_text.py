"""The layers of the CLIP text encoders, by rule from their configurations.

transformers calls OpenAI's and OpenCLIP's encoders by the same names. The single file does so with OpenAI's alone;
OpenCLIP's (SD 2.x, and the second of SDXL) have names of their own there, with q, k and v in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loratune.families.layouts import Config, Layer, Shape, get

# OpenCLIP's names of what is inside a layer; q, k and v are the thirds of one tensor.
OPEN_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj": "attn.in_proj",
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
FUSED = ("_weight", "_bias")
BARE = ("", "")  # parameters that are no module's
POSITION_IDS = "embeddings.position_ids"


def canonical_text_name(name: str) -> str:
    """A CLIP text encoder's module or key name with the text_model level, which transformers 5 left out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def canonical_text_key(key: str) -> str | None:
    """The name today of a key of a CLIP text encoder; None for a buffer."""
    return None if key.endswith(POSITION_IDS) else canonical_text_name(key)


def _parts(config: Config) -> dict[str, Shape]:
    """The shapes of the weights inside a layer."""
    width, inner = (get(config, "text_encoder", key) for key in ("hidden_size", "intermediate_size"))
    attention = dict.fromkeys((f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), (width, width))
    feed = {"layer_norm2": (width,), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    return {"layer_norm1": (width,), **attention, **feed}


def text_layers(config: Config) -> Iterator[Layer]:
    """The layers of a CLIPTextModel; the single file has the same names, with the text_model level.

    Raises:
        UserError: the configuration lacks a key.
    """

    def same(part: str, shape: Shape, bias: bool = True, table: bool = False) -> Layer:
        return Layer(f"text_model.{part}", f"text_model.{part}", shape, bias, table=table)

    width = get(config, "text_encoder", "hidden_size")
    words, places = (get(config, "text_encoder", key) for key in ("vocab_size", "max_position_embeddings"))
    yield same("embeddings.token_embedding", (words, width), bias=False, table=True)
    yield same("embeddings.position_embedding", (places, width), bias=False, table=True)
    for index in range(get(config, "text_encoder", "num_hidden_layers")):
        yield from (same(f"encoder.layers.{index}.{part}", shape) for part, shape in _parts(config).items())
    yield same("final_layer_norm", (width,))


def open_clip_layers(config: Config) -> Iterator[Layer]:
    """The layers of a CLIPTextModel whose single file has OpenCLIP's names.

    Raises:
        UserError: the configuration lacks a key.
    """
    outside = {"final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding"}
    for layer in text_layers(config):
        path = layer.name.removeprefix("text_model.")
        if path.startswith("encoder.layers."):
            index, _, part = path.removeprefix("encoder.layers.").partition(".")
            layer = replace(layer, ldm=f"transformer.resblocks.{index}.{OPEN_CLIP_PARTS[part]}")
            yield replace(layer, suffixes=FUSED, third=THIRDS[part]) if part in THIRDS else layer
        elif path == "embeddings.position_embedding":
            yield replace(layer, ldm="positional_embedding", suffixes=BARE)
        else:
            yield replace(layer, ldm=outside[path])


def open_clip_projected_layers(config: Config) -> Iterator[Layer]:
    """Those of a CLIPTextModelWithProjection; the file's projection multiplies from the right (x P), ours W x.

    Raises:
        UserError: the configuration lacks a key.
    """
    yield from open_clip_layers(config)
    shape = tuple(get(config, "text_encoder_2", key) for key in ("projection_dim", "hidden_size"))
    yield Layer("text_projection", "text_projection", shape, bias=False, suffixes=BARE, transposed=True)
