"""A merged base predicts what the base with its LoRA does, and nothing else in it has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.cli.verbs.merge import merge
from loratune.errors import UserError
from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.formats.headers import read_header
from loratune.lora.file import LoRAFile, on_torch, write_lora
from loratune.lora.inject import LoRA, adapted_layers, switch
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.load import load_with
from loratune.lora.merge.memory import add, merge_into, parse_weighted
from loratune.lora.merge.run import MERGES_KEY
from loratune.training.lora_module import LoRAModule

QUICK = settings(max_examples=60, deadline=None)
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


def predictions(family: Model) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = family.eval().encode_prompts(["a red disc", "a blue disc"])
        return family.denoise(x, torch.tensor([10, 900]), told)


def adapted(base: Path, seed: int, targets: str = "cross-attention", text: bool = True) -> LoRAModule:
    """The base with a LoRA whose B is random, large enough to be seen."""
    torch.manual_seed(seed)
    module = LoRAModule(str(base), LoRA(rank=3, alpha=2, targets=targets, text_encoder=text)).eval()
    for layer in adapted_layers(module.model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return module


class Made:
    """LoRAs of the tiny base, as files and as modules, and the base as a single file."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder_base, self.file_base = base, folder / "base.safetensors"
        self.modules = {
            "one": adapted(base, 1),
            "two": adapted(base, 2, "attention+ff", text=False),
            "convs": adapted(base, 3, r".*(proj_in|conv1|conv2|time_emb_proj)", text=False),
        }
        self.files = {name: folder / f"{name}.safetensors" for name in self.modules}
        for name, module in self.modules.items():
            write_lora(self.files[name], LoRAFile(module.layers()))
        zero = folder / "zero.safetensors"
        write_lora(zero, LoRAFile({QUERY: LoRALayer(torch.ones(1, 16), torch.zeros(16, 1), 1.0)}))
        merge(str(base), [str(zero)], self.file_base)

    def base(self, kind: str) -> Path:
        return self.folder_base if kind == "folder" else self.file_base


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tiny_base, tmp_path_factory.mktemp("loras"))


def out_of(kind: str, folder: Path) -> Path:
    return folder / ("merged" if kind == "folder" else "merged.safetensors")


def raw(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, in the file's order."""
    header, data = read_header(path), path.read_bytes()
    start = header.data_offset
    return {key: data[start + info.start : start + info.stop] for key, info in header.tensors.items()}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Merged is the same as adapted.


@pytest.mark.parametrize("name", ["one", "two", "convs"])
@pytest.mark.parametrize(
    ("source", "target"), [("folder", "file"), ("folder", "folder"), ("file", "file"), ("file", "folder")]
)
def test_merged_predicts_what_adapted_does(made: Made, tmp_path: Path, name: str, source: str, target: str) -> None:
    wanted = predictions(made.modules[name].model)
    out = out_of(target, tmp_path)
    merge(str(made.base(source)), [str(made.files[name])], out)
    assert left(tmp_path) == [out.name]
    found = predictions(load_model(str(out)))
    assert (found - wanted).abs().max() < 1e-5
    assert (found - predictions(load_model(str(made.folder_base)))).abs().max() > 1e-3


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_text_encoders_lora_changes_what_text_means(made: Made, tmp_path: Path, source: str) -> None:
    out = out_of(source, tmp_path)
    merge(str(made.base(source)), [str(made.files["one"])], out)
    with torch.no_grad():
        wanted = made.modules["one"].model.encode_prompts(["a red disc"])["text"]
        found = load_model(str(out)).eval().encode_prompts(["a red disc"])["text"]
        plain = load_model(str(made.folder_base)).eval().encode_prompts(["a red disc"])["text"]
    assert (found - wanted).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_the_verbs_add_in_memory_what_they_write(made: Made, tmp_path: Path, format: str) -> None:
    file = tmp_path / "lora.safetensors"
    write_lora(file, LoRAFile(made.modules["two"].layers()), format)  # type: ignore[arg-type]
    wanted = predictions(made.modules["two"].model)
    assert (predictions(load_with(str(made.folder_base), [str(file)], "cpu")) - wanted).abs().max() < 1e-5
    merge(str(made.file_base), [str(file)], tmp_path / "merged.safetensors")
    assert (predictions(load_model(str(tmp_path / "merged.safetensors"))) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("weight", [0.5, -0.7, 2.0])
def test_weights_scale(made: Made, tmp_path: Path, weight: float) -> None:
    module = made.modules["two"]
    switch([module.model], weight)
    wanted = predictions(module.model)
    switch([module.model], 1.0)
    for kind in ("folder", "file"):
        merge(str(made.base(kind)), [f"{made.files['two']}:{weight}"], out_of(kind, tmp_path))
        assert (predictions(load_model(str(out_of(kind, tmp_path)))) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["folder", "file"])
def test_two_loras_add(made: Made, tmp_path: Path, source: str) -> None:
    both = [f"{made.files['one']}:0.5", f"{made.files['two']}:-1.5"]
    merge(str(made.base(source)), both, out_of(source, tmp_path))
    found = load_model(str(out_of(source, tmp_path)))
    base = load_model(str(made.folder_base))
    layers = [(0.5, made.modules["one"].layers()), (-1.5, made.modules["two"].layers())]
    before, after = dict(base.network.named_parameters()), dict(found.network.named_parameters())
    for key, w in before.items():
        name = f"unet.{key.removesuffix('.weight')}"
        wanted = w.detach().double()
        for weight, some in layers:
            if name in some:
                one = some[name]
                wanted = wanted + weight * one.alpha / one.rank * one.up.double() @ one.down.double()
        assert torch.allclose(after[key].detach().double(), wanted, atol=1e-6), key
    reversed_out = tmp_path / ("reversed" if source == "folder" else "reversed.safetensors")
    merge(str(made.base(source)), both[::-1], reversed_out)
    assert (predictions(load_model(str(reversed_out))) - predictions(found)).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_lora_and_its_negative_are_the_base(made: Made, tmp_path: Path, source: str) -> None:
    merge(str(made.base(source)), [f"{made.files['one']}:1", f"{made.files['one']}:-1"], out_of(source, tmp_path))
    found = predictions(load_model(str(out_of(source, tmp_path))))
    assert (found - predictions(load_model(str(made.folder_base)))).abs().max() < 1e-5


# Nothing else has changed.


def with_negative_zeros(file: Path, copy: Path) -> Path:
    """A copy whose float32 tensors begin with -0.0, which adding 0.0 would turn into 0.0."""
    data = bytearray(file.read_bytes())
    header = read_header(file)
    for info in header.tensors.values():
        if info.dtype == "F32":
            data[header.data_offset + info.start : header.data_offset + info.start + 4] = b"\0\0\0\x80"
    copy.write_bytes(data)
    return copy


def test_weight_0_leaves_every_byte(made: Made, tmp_path: Path) -> None:
    base = with_negative_zeros(made.file_base, tmp_path / "base.safetensors")
    merge(str(base), [f"{made.files['two']}:0", f"{made.files['one']}:-0"], tmp_path / "merged.safetensors")
    assert raw(tmp_path / "merged.safetensors") == raw(base)
    folder = tmp_path / "base"
    shutil.copytree(made.folder_base, folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with_negative_zeros(unet, unet)
    merge(str(folder), [f"{made.files['two']}:0"], tmp_path / "merged")
    for file in folder.rglob("*"):
        merged = tmp_path / "merged" / file.relative_to(folder)
        if file.suffix == ".safetensors":
            assert raw(merged) == raw(file), file
        elif file.is_file():
            assert merged.read_bytes() == file.read_bytes(), file
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another copy")
    merge(str(folder), [f"{made.files['two']}:1"], tmp_path / "once")
    names = {path.name for path in (tmp_path / "once" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert MERGES_KEY in read_header(tmp_path / "once" / "unet" / "diffusion_pytorch_model.safetensors").metadata


def test_what_is_not_merged_keeps_its_bytes_and_its_place(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    merge(str(made.file_base), [str(made.files["one"])], out)
    before, after = raw(made.file_base), raw(out)
    assert list(before) == list(after)
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == len(made.modules["one"].layers())
    assert all(".attn2.to_" in key or ".self_attn." in key for key in changed)
    old, new = read_header(made.file_base), read_header(out)
    assert old.tensors == new.tensors
    assert new.metadata[CONFIGS_KEY] == old.metadata[CONFIGS_KEY]
    note = json.loads(new.metadata[MERGES_KEY])
    assert note[-1] == {"base": str(made.file_base), "loras": [[str(made.files["one"]), 1.0]]}
    assert len(note) == 2  # the base was merged before
    assert set(new.metadata) == set(old.metadata)


def test_a_merged_folder_differs_in_the_merged_tensors_alone(made: Made, tmp_path: Path) -> None:
    merge(str(made.folder_base), [str(made.files["two"])], tmp_path / "merged")
    files = sorted(path.relative_to(made.folder_base) for path in made.folder_base.rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*"))
    unet = Path("unet") / "diffusion_pytorch_model.safetensors"
    for file in files:
        if (made.folder_base / file).is_file() and file != unet:
            assert (tmp_path / "merged" / file).read_bytes() == (made.folder_base / file).read_bytes(), file
    before, after = raw(made.folder_base / unet), raw(tmp_path / "merged" / unet)
    assert list(before) == list(after)
    changed = {f"unet.{key.removesuffix('.weight')}" for key in before if before[key] != after[key]}
    assert changed == set(made.modules["two"].layers())


def test_the_base_is_never_written_to(made: Made, tmp_path: Path) -> None:
    before = made.file_base.read_bytes()
    merge(str(made.file_base), [str(made.files["two"])], tmp_path / "merged.safetensors")
    assert made.file_base.read_bytes() == before


# What is refused.


def strange(path: Path, kind: str) -> Path:
    layers = {
        "shape": {QUERY: LoRALayer(torch.ones(2, 24), torch.ones(16, 2), 2.0)},
        "layer": {
            QUERY.replace("down_blocks.0", "down_blocks.7"): LoRALayer(torch.ones(2, 16), torch.ones(16, 2), 2.0)
        },
        "conv": {QUERY: LoRALayer(torch.ones(2, 16, 3, 3), torch.ones(16, 2, 1, 1), 2.0)},
    }[kind]
    good = {QUERY.replace("to_q", "to_v"): LoRALayer(torch.ones(2, 16), torch.ones(16, 2), 2.0)}
    write_lora(path, LoRAFile({**good, **layers}))
    return path


@pytest.mark.parametrize("kind", ["shape", "layer", "conv"])
@pytest.mark.parametrize(
    ("source", "target"), [("folder", "folder"), ("folder", "file"), ("file", "file"), ("file", "folder")]
)
def test_a_lora_of_another_base_is_refused(made: Made, tmp_path: Path, kind: str, source: str, target: str) -> None:
    lora = strange(tmp_path / "strange.safetensors", kind)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError) as error:
        merge(str(made.base(source)), [str(made.files["one"]), str(lora)], out_of(target, out))
    told = str(error.value)
    assert told.startswith(f"{lora}: does not fit this base: ")
    assert "attn2.to_q" in told
    if kind == "shape":
        assert "[16, 24]" in told
        assert "[16, 16]" in told
    assert left(out) == []


def test_a_base_in_memory_refuses_it_too_and_stays(made: Made, tmp_path: Path) -> None:
    family = load_model(str(made.folder_base))
    before = predictions(family)
    loras = [parse_weighted(str(made.files["one"])), parse_weighted(str(strange(tmp_path / "s.safetensors", "shape")))]
    with pytest.raises(UserError, match="does not fit this base"):
        merge_into(family.components(), loras)
    assert torch.equal(predictions(family), before)


def test_the_base_is_not_overwritten(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.safetensors"
    shutil.copyfile(made.file_base, base)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(base)
    for out in (base, Path("base.safetensors"), tmp_path / "x" / ".." / "base.safetensors", Path("link.safetensors")):
        with pytest.raises(UserError, match="is the base itself; give another name"):
            merge(str(base), [str(made.files["two"])], out)
    assert base.read_bytes() == made.file_base.read_bytes()
    with pytest.raises(UserError, match="is the base itself"):
        merge(str(made.folder_base), [str(made.files["two"])], made.folder_base)


def test_a_folder_with_something_in_it_is_not_overwritten(made: Made, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    for source in ("folder", "file"):
        with pytest.raises(UserError, match="not an empty folder"):
            merge(str(made.base(source)), [str(made.files["two"])], tmp_path / "merged")
    assert left(tmp_path / "merged") == ["mine.txt"]
    assert left(tmp_path) == ["merged"]


def test_nothing_to_add_is_an_error(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to add; give --lora FILE"):
        merge(str(made.file_base), [], tmp_path / "merged.safetensors")


# FILE:SCALE.


@pytest.mark.parametrize(
    ("suffix", "weight"), [("", 1.0), (":0.8", 0.8), (":-1", -1.0), (":1e-2", 0.01), (":0", 0.0), (":+2", 2.0)]
)
def test_a_file_and_its_weight(made: Made, suffix: str, weight: float) -> None:
    found = parse_weighted(f"{made.files['one']}{suffix}")
    assert (found.path, found.weight) == (made.files["one"], weight)
    assert {name: on_torch(layer) for name, layer in found.file.layers.items()} == made.modules["one"].layers()


@QUICK
@given(st.floats(-1e30, 1e30))
def test_every_number_is_read_as_it_is(made: Made, weight: float) -> None:
    assert parse_weighted(f"{made.files['two']}:{weight!r}").weight == weight


def test_a_name_with_a_colon_is_a_name_where_there_is_such_a_file(made: Made, tmp_path: Path) -> None:
    odd = tmp_path / "lora:0.5.safetensors"
    shutil.copyfile(made.files["one"], odd)
    assert parse_weighted(str(odd)).weight == 1.0
    assert parse_weighted(f"{odd}:0.25").weight == 0.25


@pytest.mark.parametrize("number", ["", "much", "0,8", "1.2.3", "0x1"])
def test_a_weight_that_is_no_number(made: Made, number: str) -> None:
    with pytest.raises(UserError, match=f"'{number}' is no number; write FILE:SCALE, such as .*one.safetensors:0.8"):
        parse_weighted(f"{made.files['one']}:{number}")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400"])
def test_a_weight_that_is_not_finite(made: Made, number: str) -> None:
    with pytest.raises(UserError, match="the weight must be finite"):
        parse_weighted(f"{made.files['one']}:{number}")


@pytest.mark.parametrize("suffix", ["", ":0.5"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors: ") as error:
        parse_weighted(f"{tmp_path / 'nothing.safetensors'}{suffix}")
    assert ":0.5" not in str(error.value)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "lora.pt").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"lora\.pt: its name ends in \.pt; only \.safetensors files are loaded"):
        parse_weighted(f"{tmp_path / 'lora.pt'}:0.5")


# The sum.


@QUICK
@given(
    st.integers(0, 1000), st.lists(st.floats(-3, 3), min_size=1, max_size=3), st.sampled_from(["linear", "1x1", "3x3"])
)
def test_the_sum_is_rounded_once(seed: int, weights: list[float], kind: str) -> None:
    random = torch.Generator().manual_seed(seed)
    k = {"linear": (), "1x1": (), "3x3": (3, 3)}[kind]
    shape = {"linear": (5, 7), "1x1": (5, 7, 1, 1), "3x3": (5, 7, 3, 3)}[kind]
    w = torch.randn(shape, generator=random)
    terms = []
    for weight in weights:
        down = torch.randn(2, 7, *k, generator=random)
        terms.append((weight, LoRALayer(down, torch.randn(5, 2, *(1 for _ in k), generator=random), 3.0)))
    wanted = w.double()
    for weight, layer in terms:
        product = torch.einsum("or,ri...->oi...", layer.up.double().reshape(5, 2), layer.down.double())
        wanted = wanted + weight * 1.5 * product.reshape(shape)

    def added(values: torch.Tensor) -> torch.Tensor:
        new = values.clone()
        add(new, terms)
        return new

    assert torch.allclose(added(w).double(), wanted, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = w.to(dtype)
        found = added(rounded)
        assert (found.dtype, found.shape) == (dtype, w.shape)
        assert torch.equal(found, added(rounded.float()).to(dtype))


# diffusers.


def test_diffusers_loads_a_merged_single_file(made: Made, tmp_path: Path) -> None:
    import diffusers

    out = tmp_path / "merged.safetensors"
    merge(str(made.folder_base), [str(made.files["one"])], out)
    pipeline: Any = diffusers.StableDiffusionPipeline.from_single_file(  # type: ignore[no-untyped-call]
        out, config=str(made.folder_base), local_files_only=True, safety_checker=None
    )
    family = load_model(str(out))
    for name, part in family.components().items():
        theirs = getattr(pipeline, name).state_dict()
        assert part.state_dict().keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in part.state_dict().items())
