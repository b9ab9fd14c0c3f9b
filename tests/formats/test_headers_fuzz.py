"""Whatever a file's bytes are, reading works or is a UserError of one line: no crash, no hang, no memory filled."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loratune.errors import UserError
from loratune.formats.headers import ITEM_SIZES, MAX_HEADER, read_header
from loratune.lora.file import read_lora
from loratune.lora.inspect import describe

MANY = settings(
    max_examples=int(os.environ.get("FUZZ", "120")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
KOHYA = f"lora_unet_{Q.replace('.', '_')}"
ONES = {"down": torch.ones(2, 4), "up": torch.ones(4, 2), "alpha": torch.tensor(1.0)}
FILES = [
    save({f"unet.{Q}.lora_A.weight": ONES["down"], f"unet.{Q}.lora_B.weight": ONES["up"]}, {"format": "pt"}),
    save(
        {
            f"{KOHYA}.lora_down.weight": ONES["down"].half(),
            f"{KOHYA}.lora_up.weight": ONES["up"].half(),
            f"{KOHYA}.alpha": ONES["alpha"].bfloat16(),
        },
        {"ss_tag_frequency": '{"a": {"b": 1}}', "loratune.base": "x"},
    ),
    save({f"{KOHYA}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}),
    save({f"{KOHYA}.lokr_w1": torch.ones(2, 2), f"{KOHYA}.lokr_w2": torch.ones(2, 2), f"{KOHYA}.alpha": ONES["alpha"]}),
    save({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3), "x": torch.arange(3)}),
]
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 32, 2**31, 2**32, 2**62, 2**63, 2**64, 2**70, 0.5, 1e308, True])
ODD: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.none(),
    st.sampled_from(
        ["", "F99", "F32", "F16", "\ud800", "\x00", "lora", [], {}, [[]], [1, 2], [[[[]]]], {"shape": []}]
    ).map(copy.deepcopy),  # they are written into
    st.lists(NUMBERS, max_size=6),
    st.sampled_from(sorted(ITEM_SIZES)),
    st.text(max_size=5),
)
NASTY: dict[str, bytes] = {
    "deep lists": b'{"a":' + b"[" * 200_000,
    "deep tables": b'{"a":' * 100_000,
    "the same key twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}',
    "a long number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}',
    "a product of 2^62 and more": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}',
    "many large sides": b'{"a":{"dtype":"F64","shape":[' + b"9223372036854775807," * 999 + b'1],"data_offsets":[0,0]}}',
    "nothing times much": b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
    "before the data": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
    "overlapping": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "all in one place": b"{"
    + b",".join(b'"%d":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}' % i for i in range(9))
    + b"}",
    "backwards": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    "far away": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[1152921504606846976,1152921504606846992]}}',
    "no numbers": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[Infinity,-Infinity]}}',
    "no text": b'{"\xff\xfe":{}}',
    "half a character": rb'{"\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "metadata that are a list": b'{"__metadata__":[1,2]}',
    "empty lora": f'{{"unet.{Q}.lora_A.weight":{{"dtype":"F32","shape":[0,0],"data_offsets":[0,0]}}}}'.encode(),
}


def with_header(text: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def survives(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    told = []
    tracemalloc.start()
    for read in (read_header, read_lora, lambda file: json.dumps(describe(file))):
        try:
            read(path)
        except UserError as error:
            told.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(str(path) in message and "\n" not in message for message in told)
    assert peak < 20_000_000 + 200 * len(content)  # a list of JSON costs 60 times its two brackets


@MANY
@given(
    st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=4)
)
def test_bytes_replaced_inserted_or_cut(tmp_path, content, edits):
    for place, new in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + 1 :]
    survives(tmp_path / "a.safetensors", content)


@MANY
@given(st.sampled_from(FILES), st.floats(0, 1))
def test_files_cut_short(tmp_path, content, place):
    survives(tmp_path / "a.safetensors", content[: int(place * len(content))])


@MANY
@given(st.sampled_from(FILES), st.one_of(st.integers(0, 2000), st.integers(0, 2**64 - 1), st.just(2**60)))
@example(FILES[0], 2**60)
@example(FILES[0], 2**64 - 1)
def test_headers_that_claim_another_length(tmp_path, content, length):
    survives(tmp_path / "a.safetensors", length.to_bytes(8, "little") + content[8:])


@MANY
@given(st.data())
def test_json_with_other_values(tmp_path, data):
    content = data.draw(st.sampled_from(FILES))
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(entries)))
        inside = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets", "more"]))
        value = data.draw(ODD)
        if inside is None or not isinstance(entries[key], dict):
            entries[key] = value
        else:
            entries[key][inside] = value
    survives(tmp_path / "a.safetensors", with_header(json.dumps(entries).encode(), content[8 + size :]))


@MANY
@given(st.data())
def test_valid_headers_with_odd_names_and_shapes(tmp_path, data):
    """Files that safetensors would take, whose tensors are not what their names promise."""
    ends = [".lora_A.weight", ".lora_B.weight", ".alpha", ".lora_down.weight", ".lora_up.weight", ".dora_scale"]
    ends += [".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".hada_w1_a", ".hada_w1_b", ".lora_mid.weight", ".x", ":up", ""]
    starts = st.sampled_from([f"unet.{Q}", KOHYA, "unet:0", "lora_te_x", "x\ny", "\u2028", "text_encoder.", ".", ""])
    names = st.builds("{}{}".format, starts, st.sampled_from(ends))
    entries, end = {}, 0
    for name in data.draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        dtype = data.draw(st.sampled_from(sorted(ITEM_SIZES)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 2**40]), max_size=5))
        count = 0 if 0 in shape else int(torch.Size(shape).numel()) if max([*shape, 1]) < 99 else None
        if count is None:
            shape, count = [0, *shape][:6], 0
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count * ITEM_SIZES[dtype]]}
        end += count * ITEM_SIZES[dtype]
    filling = data.draw(st.sampled_from([b"\0", b"\x3c", b"\xff", b"\x01"]))
    survives(tmp_path / "a.safetensors", with_header(json.dumps(entries).encode(), filling * end))


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("data", [b"", b"\0" * 64])
def test_headers_made_to_hurt(tmp_path, name, data):
    survives(tmp_path / "a.safetensors", with_header(NASTY[name], data))


def test_a_header_too_long_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER + 100)
    tracemalloc.start()
    with pytest.raises(UserError, match="100000000 are allowed"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
