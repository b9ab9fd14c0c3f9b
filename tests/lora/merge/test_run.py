"""`loratune merge`: every family, whole or not at all, and what it says it did; held against float64."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratune.cli.main import main
from loratune.cli.verbs.merge import merge
from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.blocks import within
from loratune.families.save import write_single_file
from loratune.families.single_file import from_single_file, to_single_file
from loratune.formats import streaming
from loratune.formats.files import read_tensors, write_safetensors
from loratune.formats.headers import read_header
from loratune.formats.numbers import spacing
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.merge.run import MERGES_KEY

RANK, ALPHA = 2, 1.0
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def layer_for(shape: tuple[int, ...], random: torch.Generator, kind: str = "LoRA") -> LowRank:
    """A layer of a kind beside a weight, large enough to be seen."""

    def some(*sizes: int) -> Tensor:
        return 0.3 * torch.randn(sizes, generator=random)

    out, flat = shape[0], int(np.prod(shape[1:]))
    ones = (1,) * (len(shape) - 2)
    if kind == "LoHa":
        return LoHaLayer(some(out, RANK), some(RANK, flat), some(out, RANK), some(RANK, flat), ALPHA)
    if kind == "LoKr":
        return LoKrLayer(ALPHA, w1=some(2, 1), w2=some(out // 2, *shape[1:]))
    m = 1 + some(out, 1, *ones).abs() if kind == "DoRA" else None
    return LoRALayer(some(RANK, *shape[1:]), some(out, RANK, *ones), ALPHA, magnitude=m)


def change(w: Tensor, layer: LowRank) -> Tensor:
    """What a layer adds at weight 1, in float64."""
    return layer.change(w.double())


class Base:
    """A base of a family with few channels, and its parts."""

    def __init__(self, folder: Path, name: str, configs: Any, weights: Any) -> None:
        self.name, self.configs, self.weights = name, configs, weights
        self.file = folder / f"{name}.safetensors"
        write_single_file(self.file, configs, weights, {"made": "by a test"})

    def shape(self, layer: str) -> tuple[int, ...]:
        part, _, key = layer.partition(".")
        return tuple(self.weights[part][f"{key}.weight"].shape)

    def lora(self, path: Path, seed: int = 0, every: int = 1, kind: str = "LoRA", format: Any = "peft") -> LoRAFile:
        """A LoRA of the base's layers, written."""
        random = torch.Generator().manual_seed(seed)
        made = {name: layer_for(self.shape(name), random, kind) for name in module_names(self.configs)[::every]}
        write_lora(path, LoRAFile(made), format)
        return LoRAFile(made)

    def parts_of(self, file: Path) -> dict[str, dict[str, Tensor]]:
        return from_single_file(load_file(file), self.configs)


@pytest.fixture(scope="session")
def base_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_configs: Callable[..., Any], tiny_weights: Callable[..., Any]
) -> Callable[[str, torch.dtype], Base]:
    made: dict[str, Base] = {}
    folder = tmp_path_factory.mktemp("bases")

    def base(architecture: str, dtype: torch.dtype = torch.float16) -> Base:
        name = f"{architecture}-{NAMES[dtype]}"
        if name not in made:
            configs = tiny_configs(architecture)
            made[name] = Base(folder, name, configs, tiny_weights(configs, dtype))
        return made[name]

    return base


@pytest.fixture
def sd15(base_of: Callable[..., Base]) -> Base:
    """The smallest of them, in half precision."""
    return base_of("sd15")


def data_of(file: Path) -> dict[str, bytes]:
    """The bytes of each tensor."""
    header, data = read_header(file), file.read_bytes()
    start = header.data_offset
    return {key: data[start + info.start : start + info.stop] for key, info in header.tensors.items()}


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_merged(base: Base, found: dict[str, dict[str, Tensor]], terms: list[tuple[float, LoRAFile]]) -> None:
    """Every weight is the float64 sum to one rounding; those without a term are the base's own, bit for bit."""
    for part, weights in base.weights.items():
        for key, w in weights.items():
            name = f"{part}.{key.removesuffix('.weight')}"
            mine = [(weight, lora.layers[name]) for weight, lora in terms if name in lora.layers and weight]
            if not mine or not key.endswith(".weight"):
                assert torch.equal(found[part][key], w), name
                continue
            wanted = w.double() + sum(weight * change(w, layer) for weight, layer in mine)
            unit = torch.from_numpy(spacing(wanted.numpy(), NAMES[w.dtype]))
            # The sum is of float32, which is off by a few of its own units of the largest term.
            slack = 5e-7 * max(float(one.abs().max()) for one in (w, *(change(w, layer) for _, layer in mine)))
            assert ((found[part][key].double() - wanted).abs() <= unit / 2 + slack).all(), name
            assert not torch.equal(found[part][key], w), name


# What is computed.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["sd15", "sd2", "sdxl"])
def test_every_layer_of_every_family(
    base_of: Callable[..., Base], tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """q, k and v that OpenCLIP's encoders hold as one tensor included."""
    base = base_of(architecture, dtype)
    lora = base.lora(tmp_path / "lora.safetensors")
    merge(str(base.file), [f"{tmp_path}/lora.safetensors:0.8"], tmp_path / "out.safetensors")
    assert_merged(base, base.parts_of(tmp_path / "out.safetensors"), [(0.8, lora)])
    old, new = read_header(base.file), read_header(tmp_path / "out.safetensors")
    assert list(old.tensors.items()) == list(new.tensors.items())
    assert new.metadata.pop(MERGES_KEY)
    assert new.metadata == old.metadata
    assert new.metadata["made"] == "by a test"


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_one_of_q_k_v_that_are_one_tensor(base_of: Callable[..., Base], tmp_path: Path, part: str) -> None:
    base = base_of("sd2")
    name = f"text_encoder.text_model.encoder.layers.1.self_attn.{part}_proj"
    lora = LoRAFile({name: layer_for(base.shape(name), torch.Generator().manual_seed(1))})
    write_lora(tmp_path / "lora.safetensors", lora)
    merge(str(base.file), [str(tmp_path / "lora.safetensors")], tmp_path / "out.safetensors")
    assert_merged(base, base.parts_of(tmp_path / "out.safetensors"), [(1.0, lora)])
    before, after = data_of(base.file), data_of(tmp_path / "out.safetensors")
    assert len([key for key in before if before[key] != after[key]]) == 1


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr"])
def test_other_kinds_of_layers(sd15: Base, tmp_path: Path, kind: str) -> None:
    lora = sd15.lora(tmp_path / "lora.safetensors", every=5, kind=kind, format="kohya")
    merge(str(sd15.file), [str(tmp_path / "lora.safetensors")], tmp_path / "out.safetensors")
    assert_merged(sd15, sd15.parts_of(tmp_path / "out.safetensors"), [(1.0, lora)])


def test_several_are_added_and_rounded_once(sd15: Base, tmp_path: Path) -> None:
    loras = [sd15.lora(tmp_path / f"{n}.safetensors", n, every, kind, "kohya")
             for n, (every, kind) in enumerate(((1, "LoRA"), (2, "LoRA"), (3, "LoHa")))]  # fmt: skip
    weights = (0.3, -1.1, 0.7)
    given = [f"{tmp_path}/{n}.safetensors:{weight}" for n, weight in enumerate(weights)]
    merge(str(sd15.file), given, tmp_path / "out.safetensors")
    terms = list(zip(weights, loras, strict=True))
    assert_merged(sd15, sd15.parts_of(tmp_path / "out.safetensors"), terms)


def test_weights_by_block(sd15: Base, tmp_path: Path) -> None:
    lora = sd15.lora(tmp_path / "lora.safetensors")
    blocks = {"down": 1.0, "mid": 0.5, "up": 0.6, "te": 0.0}
    given = f"{tmp_path}/lora.safetensors:0.8," + ",".join(f"{key}={value}" for key, value in blocks.items())
    merge(str(sd15.file), [given], tmp_path / "out.safetensors")
    terms = []
    for block in (*blocks, ""):
        names = [name for name in lora.layers if not block or within(name, block)]
        names = [name for name in names if block or not any(within(name, other) for other in blocks)]
        assert names
        terms.append((0.8 * blocks.get(block, 1.0), LoRAFile({name: lora.layers[name] for name in names})))
    assert_merged(sd15, sd15.parts_of(tmp_path / "out.safetensors"), terms)
    noted = json.loads(read_header(tmp_path / "out.safetensors").metadata[MERGES_KEY])
    assert noted[-1]["loras"] == [[f"{tmp_path}/lora.safetensors", 0.8, blocks]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exactly_is_the_float64_sum_rounded(base_of: Callable[..., Base], tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_of("sd15", dtype)
    loras = [base.lora(tmp_path / f"{n}.safetensors", n, 4) for n in range(2)]
    given = [f"{tmp_path}/{n}.safetensors:{weight}" for n, weight in enumerate((0.7, 0.2))]
    merge(str(base.file), given, tmp_path / "out.safetensors", exact=True)
    found, fewer = base.parts_of(tmp_path / "out.safetensors"), 0
    for name, layer in loras[0].layers.items():
        part, _, key = name.partition(".")
        w = base.weights[part][f"{key}.weight"]
        wanted = w.double() + 0.7 * change(w, layer) + 0.2 * change(w, loras[1].layers[name])
        # `spacing` is that of the exact sum: half of it is the nearest number, but for ties of the last float64 bit.
        unit = torch.from_numpy(spacing(wanted.numpy(), NAMES[dtype]))
        off = (found[part][f"{key}.weight"].double() - wanted).abs() / unit
        assert float(off.max()) <= 0.5 + 1e-6
        single = w.float() + 0.7 * layer.change(w.float()) + 0.2 * loras[1].layers[name].change(w.float())
        fewer += int((single.to(dtype) != found[part][f"{key}.weight"]).sum())
    assert fewer > 0  # which float32 does not give


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_unmerged_is_as_near_as_told(base_of: Callable[..., Base], tmp_path: Path, capsys: Any, dtype: Any) -> None:
    base = base_of("sd15", dtype)
    base.lora(tmp_path / "lora.safetensors", every=3)
    given = [f"{tmp_path}/lora.safetensors:0.8"]
    merge(str(base.file), given, tmp_path / "merged.safetensors")
    merge(str(tmp_path / "merged.safetensors"), given, tmp_path / "back.safetensors", unmerge=True, json=True)
    told = json.loads(capsys.readouterr().out.partition("{")[2].join(("{", "")))
    old, new = load_file(base.file), load_file(tmp_path / "back.safetensors")
    off = sum(float((new[key].double() - old[key].double()).square().sum()) for key in old) ** 0.5
    changed = load_file(tmp_path / "merged.safetensors")
    size = sum(float(changed[key].double().square().sum()) for key in old if not torch.equal(changed[key], old[key]))
    differ = sum(int((new[key] != old[key]).sum()) for key in old)
    assert 0 < differ <= told["may differ"]
    assert off / size**0.5 <= told["differ at most"] < 1e-2
    assert told["differ expected"] / 4 < off / size**0.5 < 4 * told["differ expected"]
    assert told["unmerge"] is True
    merge(str(tmp_path / "merged.safetensors"), given, tmp_path / "back.safetensors", unmerge=True)
    assert "of the elements may differ from the original by rounding" in capsys.readouterr().out


def test_a_dora_cannot_be_taken_out(sd15: Base, tmp_path: Path) -> None:
    sd15.lora(tmp_path / "dora.safetensors", every=9, kind="DoRA", format="kohya")
    with pytest.raises(UserError, match=r"dora\.safetensors: .* is a DoRA, .*; it cannot be unmerged"):
        merge(str(sd15.file), [str(tmp_path / "dora.safetensors")], tmp_path / "out.safetensors", unmerge=True)
    assert left(tmp_path) == ["dora.safetensors"]


# What a base is.


@pytest.fixture
def folder_base(base_of: Callable[..., Base], tmp_path: Path) -> tuple[Base, Path]:
    """SDXL as a diffusers folder."""
    base = base_of("sdxl")
    zero = LoRAFile({(name := module_names(base.configs)[0]): layer_for(base.shape(name), torch.Generator())})
    write_lora(tmp_path / "zero.safetensors", zero)
    merge(str(base.file), [f"{tmp_path}/zero.safetensors:0"], tmp_path / "folder")
    return base, tmp_path / "folder"


def folder_parts(base: Base, folder: Path) -> dict[str, dict[str, Tensor]]:
    from loratune.families.known import parts
    from loratune.families.single_file import canonical_keys

    found = {}
    for part in base.weights:
        files = sorted((folder / part).glob("*.safetensors"))
        found[part] = canonical_keys(parts()[part], {k: v for file in files for k, v in load_file(file).items()})
    return found


@pytest.mark.parametrize("shape", ["plain", "shards", "variant"])
def test_folders(folder_base: tuple[Base, Path], tmp_path: Path, shape: str) -> None:
    base, folder = folder_base
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if shape == "shards":
        whole = load_file(unet)
        keys, weight_map = sorted(whole), {}
        for number in range(3):
            file = unet.with_name(f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors")
            write_safetensors(file, {key: whole[key] for key in keys[number::3]}, {"format": "pt"})
            weight_map |= dict.fromkeys(keys[number::3], file.name)
        index = {"metadata": {}, "weight_map": weight_map}
        unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        unet.unlink()
    elif shape == "variant":
        unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    lora = base.lora(tmp_path / "lora.safetensors")
    merge(str(folder), [str(tmp_path / "lora.safetensors")], tmp_path / "out")
    assert_merged(base, folder_parts(base, tmp_path / "out"), [(1.0, lora)])
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name not in ("unet", "text_encoder", "text_encoder_2"):
            assert (tmp_path / "out" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")
    )
    merge(str(folder), [str(tmp_path / "lora.safetensors")], tmp_path / "single.safetensors")
    assert_merged(base, base.parts_of(tmp_path / "single.safetensors"), [(1.0, lora)])


def test_in_place_replaces_the_base(sd15: Base, folder_base: tuple[Base, Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copyfile(sd15.file, file)
    lora = sd15.lora(tmp_path / "lora.safetensors", every=3)
    (tmp_path / "link.safetensors").symlink_to(file)
    merge(str(file), [str(tmp_path / "lora.safetensors")], tmp_path / "link.safetensors", in_place=True)
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_merged(sd15, sd15.parts_of(file), [(1.0, lora)])
    base, folder = folder_base
    lora = base.lora(tmp_path / "lora2.safetensors", every=7)
    merge(str(folder), [str(tmp_path / "lora2.safetensors")], folder, in_place=True)
    assert_merged(base, folder_parts(base, folder), [(1.0, lora)])
    assert not [name for name in left(tmp_path) if name.startswith(".")]


def test_the_base_under_another_name_is_not_replaced(sd15: Base, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copyfile(sd15.file, file)
    before = file.read_bytes()
    sd15.lora(tmp_path / "lora.safetensors", every=9)
    os.link(file, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to("mine.safetensors")
    (tmp_path / "sub").symlink_to(tmp_path)
    for name in ("mine.safetensors", "hard.safetensors", "soft.safetensors", "sub/mine.safetensors"):
        with pytest.raises(UserError, match="is the base itself; give another name, or --in-place"):
            merge(str(file), [str(tmp_path / "lora.safetensors")], tmp_path / name)
    with pytest.raises(UserError, match="is a LoRA that is merged"):
        merge(str(file), [str(tmp_path / "lora.safetensors")], tmp_path / "lora.safetensors", in_place=True)
    assert file.read_bytes() == before


def test_an_older_output_is_replaced(sd15: Base, tmp_path: Path) -> None:
    lora = sd15.lora(tmp_path / "lora.safetensors", every=9)
    (tmp_path / "out.safetensors").write_text("older")
    merge(str(sd15.file), [str(tmp_path / "lora.safetensors")], tmp_path / "out.safetensors")
    assert_merged(sd15, sd15.parts_of(tmp_path / "out.safetensors"), [(1.0, lora)])


# What goes wrong.


def test_layers_that_the_base_lacks(base_of: Callable[..., Base], sd15: Base, tmp_path: Path, capsys: Any) -> None:
    lora = sd15.lora(tmp_path / "good.safetensors", every=9)
    strange = "unet.down_blocks.7.attentions.0.proj_in"
    write_lora(tmp_path / "lora.safetensors", LoRAFile({**lora.layers, strange: layer_for((8, 8), torch.Generator())}))
    words = ["merge", "--base", str(sd15.file), "--lora", str(tmp_path / "lora.safetensors"), "--out",
             str(tmp_path / "out.safetensors")]  # fmt: skip
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert strange in told
    assert "--allow-partial leaves them out" in told
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*words, "--allow-partial", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loras"][0]["unmatched"] == [strange]
    assert report["loras"][0]["matched"] == len(lora.layers)
    assert_merged(sd15, sd15.parts_of(tmp_path / "out.safetensors"), [(1.0, lora)])
    base_of("sdxl").lora(tmp_path / "other.safetensors", every=9)
    with pytest.raises(
        UserError,
        match=r"other\.safetensors: does not fit this base: .*\d+ of its \d+ layers fit, and --all",
    ):
        merge(str(sd15.file), [str(tmp_path / "other.safetensors")], tmp_path / "out.safetensors", allow_partial=True)


def damaged(path: Path, kind: str) -> Path:
    """A LoRA with a fault."""
    tensors = read_tensors(path)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    if kind == "NaN":
        tensors[key] = tensors[key] * torch.nan
    elif kind == "foreign key":
        tensors["something.else"] = torch.ones(1)
    elif kind == "half a pair":
        del tensors[key]
    elif kind == "rank":
        tensors[key] = tensors[key][:, :1]
    write_safetensors(path, tensors, read_header(path).metadata)
    return path


@pytest.mark.parametrize("kind", ["NaN", "foreign key", "half a pair", "rank"])
def test_a_damaged_lora_is_one_line_and_no_output(sd15: Base, tmp_path: Path, capsys: Any, kind: str) -> None:
    sd15.lora(tmp_path / "lora.safetensors", every=9)
    lora = damaged(tmp_path / "lora.safetensors", kind)
    (tmp_path / "out.safetensors").write_text("older")
    words = ["--base", str(sd15.file), "--lora", str(lora), "--out", str(tmp_path / "out.safetensors")]
    assert main(["merge", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(lora) in told
    assert (tmp_path / "out.safetensors").read_text() == "older"
    assert left(tmp_path) == ["lora.safetensors", "out.safetensors"]


def test_a_pickle_with_another_name_is_refused(sd15: Base, tmp_path: Path, capsys: Any) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "lora.safetensors")
    words = ["--lora", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "out.safetensors")]
    assert main(["merge", "--base", str(sd15.file), *words]) == 2
    assert "as a pickle can run any code" in capsys.readouterr().err
    assert left(tmp_path) == ["lora.safetensors"]


KILLED = """
import os, signal, sys
from loratune.formats import streaming
real, count = streaming.Output.{name}, 0
def killed(self, *arguments):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments)
streaming.Output.{name} = killed
from loratune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "at", "in_place"), [("copy", 2, False), ("write", 3, False), ("write", 3, True)])
def test_a_killed_merge_harms_nothing(sd15: Base, tmp_path: Path, name: str, at: int, in_place: bool) -> None:
    file, lora = tmp_path / "base.safetensors", sd15.lora(tmp_path / "lora.safetensors", every=3)
    shutil.copyfile(sd15.file, file)
    before = file.read_bytes()
    out = file if in_place else tmp_path / "out.safetensors"
    if not in_place:
        out.write_text("older")
    code = "from loratune.formats import streaming; streaming.CHUNK = 4096\n" + KILLED.format(name=name, at=at)
    words = ["merge", "--base", str(file), "--lora", str(tmp_path / "lora.safetensors"), "--out", str(out)]
    words += ["--in-place"] if in_place else []
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert file.read_bytes() == before
    assert in_place or out.read_text() == "older"
    (leftover,) = (entry for entry in left(tmp_path) if entry.startswith("."))
    assert leftover.endswith(".tmp")
    assert main(words) == 0
    assert_merged(sd15, sd15.parts_of(out), [(1.0, lora)])
    assert left(tmp_path) == sorted({"base.safetensors", "lora.safetensors", out.name})


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("which", ["copied", "merged"])
def test_a_full_disk_harms_nothing(
    folder_base: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str, which: str
) -> None:
    base, folder = folder_base
    base.lora(tmp_path / "lora.safetensors", every=3)
    source, out = (base.file, tmp_path / "out.safetensors") if kind == "file" else (folder, tmp_path / "out")
    if kind == "file":
        out.write_text("older")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    count = 0

    def full(self: streaming.Output, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments)

    name = "copy" if which == "copied" else "write"
    real = getattr(streaming.Output, name)
    monkeypatch.setattr(streaming.Output, name, full)
    monkeypatch.setattr(streaming, "CHUNK", 4096)
    words = ["--base", str(source), "--lora", str(tmp_path / "lora.safetensors"), "--out", str(out)]
    assert main(["merge", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{out}: cannot be written" in told
    assert "No space left on device" in told
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_may_not_be_so_large(sd15: Base, tmp_path: Path) -> None:
    """A real write that the system refuses half-way, in a process of its own."""
    sd15.lora(tmp_path / "lora.safetensors", every=3)
    size = sd15.file.stat().st_size // 2
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "from loratune.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out.safetensors"
    words = ["merge", "--base", str(sd15.file), "--lora", str(tmp_path / "lora.safetensors"), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{out}: cannot be written" in done.stderr
    assert left(tmp_path) == ["lora.safetensors"]


def test_room_is_asked_for_first(
    sd15: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sd15.lora(tmp_path / "lora.safetensors", every=9)
    size = sd15.file.stat().st_size
    monkeypatch.setattr(streaming.Output, "copy", lambda *arguments: pytest.fail("something was copied"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * size, 9 * size, size - 1))
    words = ["--lora", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "out.safetensors")]
    assert main(["merge", "--base", str(sd15.file), *words]) == 2
    assert "out.safetensors: needs 0." in capsys.readouterr().err
    assert left(tmp_path) == ["lora.safetensors"]


def test_a_weight_too_large_for_the_dtype(sd15: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd15.lora(tmp_path / "lora.safetensors", every=9)
    words = ["--lora", f"{tmp_path}/lora.safetensors:1e7", "--out", str(tmp_path / "out.safetensors")]
    assert main(["merge", "--base", str(sd15.file), *words]) == 2
    told = capsys.readouterr().err
    assert f"{sd15.file}: '" in told
    assert "would get values beyond 65504" in told
    assert left(tmp_path) == ["lora.safetensors"]


# What it says, and what it needs.


def test_the_report_counts_what_was_done(sd15: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = sd15.lora(tmp_path / "lora.safetensors", every=2)
    given = [f"{tmp_path}/lora.safetensors:0.05"]
    merge(str(sd15.file), given, tmp_path / "out.safetensors", json=True)
    report = json.loads(capsys.readouterr().out)
    found = sd15.parts_of(tmp_path / "out.safetensors")
    change_2 = base_2 = unchanged = elements = 0.0
    for name, layer in lora.layers.items():
        part, _, key = name.partition(".")
        w = sd15.weights[part][f"{key}.weight"]
        change_2 += float((0.05 * change(w, layer)).square().sum())
        base_2 += float(w.double().square().sum())
        unchanged += int((found[part][f"{key}.weight"] == w).sum())
        elements += w.numel()
    assert report["layers"] == report["loras"][0]["matched"] == len(lora.layers)
    assert report["elements"] == elements
    assert report["unchanged"] == unchanged > 0
    assert report["change"] == pytest.approx((change_2 / base_2) ** 0.5, rel=1e-4)
    assert sum(block["layers"] for block in report["blocks"].values()) == report["layers"]
    assert list(report["blocks"]) == ["unet", "down.0", "down.1", "down.2", "down.3", "mid",
                                      "up.0", "up.1", "up.2", "up.3", "te1"]  # fmt: skip
    merge(str(sd15.file), given, tmp_path / "out.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["block", "layers", "||dW||/||W||", "rounded", "away"]
    assert len({len(line) for line in lines[:13]}) == 1
    assert lines[12].startswith("all")
    assert f"{len(lora.layers)} of {len(lora.layers)} layers matched" in lines[13]
    assert lines[-1].endswith("changed by 1 LoRA")


@pytest.mark.parametrize(
    ("format", "dtype"), [("kohya", torch.float16), ("peft", torch.bfloat16), ("kohya", torch.float32)]
)
def test_plain_loras_need_no_torch(
    base_of: Callable[..., Base], tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    base = base_of("sd15", dtype)
    lora = base.lora(tmp_path / "lora.safetensors", every=3, format=format)
    heavy = "torch", "transformers", "diffusers", "lightning", "peft", "safetensors", "scipy"
    code = (
        "import sys; from loratune.cli.main import main; done = main(sys.argv[1:])\n"
        f"sys.exit(done or str([name for name in {heavy} if name in sys.modules] or 0).strip('0') or 0)"
    )
    words = ["merge", "--base", str(base.file), "--lora", str(tmp_path / "lora.safetensors"), "--out",
             str(tmp_path / "out.safetensors")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_merged(base, base.parts_of(tmp_path / "out.safetensors"), [(1.0, lora)])


def test_each_merge_is_noted(sd15: Base, tmp_path: Path) -> None:
    sd15.lora(tmp_path / "lora.safetensors", every=9)
    given = [f"{tmp_path}/lora.safetensors:0.5"]
    merge(str(sd15.file), given, tmp_path / "a.safetensors", exact=True)
    merge(str(tmp_path / "a.safetensors"), given, tmp_path / "b.safetensors", unmerge=True)
    noted = json.loads(read_header(tmp_path / "b.safetensors").metadata[MERGES_KEY])
    loras = [[f"{tmp_path}/lora.safetensors", 0.5]]
    assert noted == [
        {"base": str(sd15.file), "loras": loras, "exact": True},
        {"base": str(tmp_path / "a.safetensors"), "loras": loras, "unmerge": True},
    ]
    assert CONFIGS_KEY in read_header(tmp_path / "b.safetensors").metadata
    assert to_single_file(sd15.weights, sd15.configs).keys() == read_header(tmp_path / "b.safetensors").tensors.keys()
