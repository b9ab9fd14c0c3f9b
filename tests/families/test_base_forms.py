"""Every verb takes a base in every form: a file, a folder, half precision alone, shards, several precisions, parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.families.base import Base
from loratune.families.locate import wanted_files
from loratune.families.save import write_single_file
from loratune.families.weight_files import index_name, variants_of
from loratune.formats.files import write_safetensors
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.kinds.lora import LoRALayer

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HUB_ID = "owner/model-xl-1.0"
LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": (16, 16),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (64, 16),
}
Change = Callable[[Path, str, dict[str, Tensor]], None]


def as_half(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    write_safetensors(folder / f"{stem}.fp16.safetensors", {k: v.half() for k, v in tensors.items()}, {"format": "pt"})


def as_shards(folder: Path, names: list[str], index: str | None, tensors: dict[str, Tensor]) -> None:
    keys = sorted(tensors)
    for number, name in enumerate(names):
        write_safetensors(folder / name, {key: tensors[key] for key in keys[number :: len(names)]}, {"format": "pt"})
    if index:
        places = {key: names[number % len(names)] for number, key in enumerate(keys)}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def sharded(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    names = [f"{stem}-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    as_shards(folder, names, f"{stem}.safetensors.index.json", tensors)


def sharded_oddly(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    """Shards whose names say nothing: the index alone knows them."""
    as_shards(folder, ["first.safetensors", "second.safetensors"], f"{stem}.safetensors.index.json", tensors)


def sharded_without_index(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    as_shards(folder, [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)], None, tensors)


def half_shards(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    names = [f"{stem}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    half = {key: value.half() for key, value in tensors.items()}
    as_shards(folder, names, f"{stem}.safetensors.index.fp16.json", half)


def several(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    """The full one beside others that are not the same, so that a wrong choice shows; and a pickle."""
    write_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
    as_half(folder, stem, {key: torch.zeros_like(value) for key, value in tensors.items()})
    half_shards(folder, stem, {key: torch.zeros_like(value) for key, value in tensors.items()})
    write_safetensors(folder / f"{stem}.non_ema.safetensors", {"x": torch.zeros(1)}, {})
    (folder / f"{stem}.bin").write_bytes(b"PK pickle")


CHANGES: dict[str, Change] = {
    "fp16": as_half,
    "shards": sharded,
    "odd-shards": sharded_oddly,
    "shards-without-index": sharded_without_index,
    "fp16-shards": half_shards,
    "several": several,
}
WHOLE = ("folder", *CHANGES, "file", "hub")
PARTIAL = {"without-vae": "vae", "without-text": "text_encoder"}
FORMS = (*WHOLE, *PARTIAL)


def make(form: str, tiny_base: Path, out: Path) -> None:
    """A form of the tiny base, written to `out`."""
    if form == "file":
        base = Base.open(str(tiny_base))
        write_single_file(out, base.configs, base.weights())
        return
    shutil.copytree(tiny_base, out)
    if form in PARTIAL:
        shutil.rmtree(out / PARTIAL[form])
    for part, stem in PARTS.items() if form in CHANGES else ():
        file = out / part / f"{stem}.safetensors"
        tensors = load_file(file)
        file.unlink()
        CHANGES[form](out / part, stem, tensors)


@pytest.fixture(scope="session")
def forms(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the base in each form is called."""
    folder = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        if form != "hub":
            make(form, tiny_base, folder / (f"{form}.safetensors" if form == "file" else form))
    snapshot = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / "abc"
    make("fp16", tiny_base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "blobs").mkdir()
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    for number, file in enumerate(files):  # the hub's cache holds links
        file.rename(blob := snapshot.parent.parent / "blobs" / str(number))
        file.symlink_to(blob)
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    paths = {form: str(folder / form) for form in FORMS}
    return paths | {"file": str(folder / "file.safetensors"), "hub": HUB_ID}


@pytest.fixture
def base(request: pytest.FixtureRequest, forms: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    cache = Path(forms["folder"]).parent / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return forms[request.param]


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a layer of the U-Net and one of the text encoder."""
    path, random = tmp_path_factory.mktemp("lora") / "lora.safetensors", torch.Generator().manual_seed(1)
    layers = {
        name: LoRALayer(torch.randn(2, n, generator=random), torch.randn(m, 2, generator=random), 2.0)
        for name, (m, n) in LAYERS.items()
    }
    write_lora(path, LoRAFile(layers))
    return path


@pytest.fixture(scope="session")
def unet_lora(lora: Path) -> Path:
    """The U-Net's layer of it alone."""
    path, file = lora.with_name("unet.safetensors"), read_lora(lora)
    write_lora(path, LoRAFile({name: layer for name, layer in file.layers.items() if name.startswith("unet")}))
    return path


def on_disk(form: str, path: str) -> Path:
    return Base.open(path).path if form == "hub" else Path(path)


@pytest.mark.parametrize(("form", "base"), [(form, form) for form in FORMS], indirect=["base"])
def test_merge_writes_what_diffusers_loads(
    form: str, base: str, tiny_base: Path, lora: Path, unet_lora: Path, tmp_path: Path
) -> None:
    lora = unet_lora if form == "without-text" else lora
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    assert main(["merge", "--base", base, "--lora", str(lora), "--out", str(out)]) == 0
    missing = {PARTIAL[form]: None} if form in PARTIAL else {}
    if form == "file":
        pipe: Any = StableDiffusionPipeline.from_single_file(str(out), config=str(tiny_base), local_files_only=True)
    else:
        variant = "fp16" if form in ("fp16", "fp16-shards", "hub") else None
        extra: Any = missing | {"variant": variant, "safety_checker": None}
        pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True, use_safetensors=True, **extra)
    before = Base.open(str(tiny_base)).weights()
    for name, layer in read_lora(lora).layers.items():
        part, _, key = name.partition(".")
        module = getattr(pipe, part)
        keys = [key, key.removeprefix("text_model.")]
        found = next(value for name, value in module.state_dict().items() if name.removesuffix(".weight") in keys)
        wanted = before[part][f"{key}.weight"] + layer.change(before[part][f"{key}.weight"])
        torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=1e-3)
    changed = {f"{name}.weight" for name in read_lora(lora).layers}
    for part, tensors in Base.open(str(out)).weights().items():
        assert tensors.keys() == before[part].keys()
        for key, value in tensors.items():
            assert torch.equal(value, before[part][key].to(value.dtype)) != (f"{part}.{key}" in changed), key
    if form == "several":  # no copy without the LoRA stays beside the merged weights; the VAE is as it was
        assert [file.name for file in (out / "unet").glob("diff*")] == ["diffusion_pytorch_model.safetensors"]
        assert len(list((out / "vae").iterdir())) == len(list((Path(base) / "vae").iterdir()))


@pytest.mark.parametrize("base", ["folder", "several", "shards", "odd-shards", "shards-without-index"], indirect=True)
def test_merge_in_place_and_to_a_file(base: str, lora: Path, forms: dict[str, str], tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(base, copied)
    assert main(["merge", "--base", base, "--lora", str(lora), "--out", str(tmp_path / "x.safetensors")]) == 0
    assert main(["merge", "--base", forms["file"], "--lora", str(lora), "--out", str(tmp_path / "y.safetensors")]) == 0
    assert load_file(tmp_path / "x.safetensors").keys() == load_file(tmp_path / "y.safetensors").keys()
    for key, value in load_file(tmp_path / "y.safetensors").items():
        assert torch.equal(load_file(tmp_path / "x.safetensors")[key], value)
    assert main(["merge", "--base", str(copied), "--lora", str(lora), "--out", str(copied), "--in-place"]) == 0
    merged, wanted = Base.open(str(copied)).weights(), Base.open(str(tmp_path / "y.safetensors")).weights()
    assert all(torch.equal(merged[part][key], value) for part in wanted for key, value in wanted[part].items())


@pytest.mark.parametrize(("form", "base"), [(form, form) for form in FORMS if form != "hub"], indirect=["base"])
def test_inspect(form: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "checkpoint"
    if form != "file":
        assert found["family"] == "Stable Diffusion 1.x"
        assert set(found["components"]) == set(PARTS) - {PARTIAL.get(form)}
        assert found["missing"] == ([PARTIAL[form]] if form in PARTIAL else [])
        assert all(part["tensors"] > 4 for part in found["components"].values())


@pytest.mark.parametrize(("form", "base"), [(form, form) for form in FORMS], indirect=["base"])
def test_extract_finds_the_lora_that_was_merged(
    form: str, base: str, lora: Path, unet_lora: Path, tmp_path: Path
) -> None:
    lora = unet_lora if form == "without-text" else lora
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    assert main(["merge", "--base", base, "--lora", str(lora), "--out", str(out)]) == 0
    file = tmp_path / "extracted.safetensors"
    assert main(["extract", "--base", base, "--tuned", str(out), "--out", str(file), "--rank", "2"]) == 0
    found, wanted = read_lora(file).layers, read_lora(lora).layers
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        torch.testing.assert_close(found[name].matrix(), layer.matrix(), atol=0.02, rtol=0.02)


def test_extract_needs_the_same_text_encoders(
    forms: dict[str, str], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = str(tmp_path / "tuned.safetensors")
    assert main(["merge", "--base", forms["file"], "--lora", str(lora), "--out", tuned]) == 0
    words = ["--out", str(tmp_path / "x.safetensors"), "--rank", "2"]
    assert main(["extract", "--base", forms["without-vae"], "--tuned", tuned, *words]) == 0
    assert read_lora(tmp_path / "x.safetensors").layers.keys() == read_lora(lora).layers.keys()
    assert main(["extract", "--base", forms["without-text"], "--tuned", tuned, *words]) == 2
    said = f"{forms['without-text']}: has no text_encoder, which {tuned} has; give two with the same parts"
    assert said in capsys.readouterr().err


WORDS: dict[str, Callable[[str, Path, Path], list[str]]] = {
    "sample": lambda base, recipe, out: [
        *("sample", "--base", base, "--prompt", "a red disc", "--steps", "1", "--size", "16", "--out", str(out))
    ],
    "measure": lambda base, recipe, out: [
        *("measure", "--base", base, "--what", "vae", "--data", str(recipe.parent / "images"), "--samples", "2"),
        *("--size", "16"),
    ],
    "fit": lambda base, recipe, out: ["fit", "-c", str(recipe), "--trainer.max_steps", "1", "--model.base", base],
    "plan": lambda base, recipe, out: ["plan", str(recipe), "--device", "cpu", "--model.base", base],
    "data": lambda base, recipe, out: ["data", str(recipe), "--model.base", base],
    "cache": lambda base, recipe, out: ["cache", str(recipe), "--model.base", base],
}


@pytest.mark.parametrize("verb", WORDS)
@pytest.mark.parametrize(("form", "base"), [(form, form) for form in FORMS], indirect=["base"])
def test_verbs_that_need_a_whole_base(
    verb: str, form: str, base: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(WORDS[verb](base, recipe, tmp_path / "samples"))
    said = capsys.readouterr()
    if form in PARTIAL:
        lines = said.err.strip().splitlines()
        assert code == 2
        assert f"{base}: has no {PARTIAL[form]}; training or sampling needs a whole base" in lines[-1]
        assert "Traceback" not in said.err
        return
    assert code == 0, said.err
    if verb == "fit":
        assert (tmp_path / "run" / "lora.safetensors").is_file()


@pytest.mark.parametrize(
    ("form", "base"), [(form, form) for form in ("shards", "odd-shards", "several")], indirect=["base"]
)
def test_every_form_draws_the_same_image(form: str, base: str, forms: dict[str, str], tmp_path: Path) -> None:
    images = []
    for name in (base, forms["folder"]):
        out = tmp_path / str(len(images))
        assert main(["sample", "--base", name, "--prompt", "x", "--steps", "1", "--size", "16", "--out", str(out)]) == 0
        images.append(next(out.glob("000-*.png")).read_bytes())
    assert images[0] == images[1]


def test_the_full_precision_is_chosen_and_said_once(forms: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    base = Base("x", Path(forms["several"]))
    assert {name.dtype for name in base.tensors.values()} == {"F32"}
    assert len(base.weights()) == 3
    assert [record.message for record in caplog.records] == [
        f"{forms['several']}: holds weights in the variants full, fp16, non_ema; full is read"
    ]


def test_one_precision_for_all_parts(tiny_base: Path, tmp_path: Path) -> None:
    """Where a part is there as fp16 alone, all are read as fp16: so diffusers opens the folder."""
    make("several", tiny_base, tmp_path / "base")
    (tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert {slot.dtype for slot in Base.open(str(tmp_path / "base")).tensors.values()} == {"F16"}


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_that_is_missing_is_named(index: bool, tiny_base: Path, tmp_path: Path) -> None:
    make("shards" if index else "shards-without-index", tiny_base, tmp_path / "base")
    shard = sorted((tmp_path / "base" / "unet").glob("*-of-*"))[-1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: there is no such file, but .*; download the base again"):
        Base.open(str(tmp_path / "base")).files("unet")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_an_index_that_lists_no_shards_is_refused(text: str, tiny_base: Path, tmp_path: Path) -> None:
    make("shards", tiny_base, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: lists no \.safetensors files under weight_map"):
        Base.open(str(tmp_path / "base")).files("unet")


def test_a_base_is_opened_once_while_it_stays_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    opened = Base.open(str(folder))
    assert Base.open(str(folder)) is opened
    shutil.rmtree(folder / "vae")
    assert Base.open(str(folder)).missing == ("vae",)


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.fp16", "a"], ["", "fp16"]),
        (["a.non_ema", "a.fp16", "a.bf16"], ["bf16", "fp16", "non_ema"]),
        (["a-00001-of-00002.fp16", "a-00002-of-00002.fp16"], ["fp16"]),
        (["a.fp16-00001-of-00002", "a.fp16-00002-of-00002", "a"], ["", "fp16"]),
        (["ab", "b", "a.", "a.fp16.x"], []),
    ],
)
def test_variants_by_their_names(names: list[str], wanted: list[str]) -> None:
    assert list(variants_of([f"{name}.safetensors" for name in names], "a.safetensors")) == wanted


@pytest.mark.parametrize(
    ("first", "index"),
    [
        ("m-00001-of-00002.safetensors", "m.safetensors.index.json"),
        ("m-00001-of-00002.fp16.safetensors", "m.safetensors.index.fp16.json"),
        ("m.fp16-00001-of-00002.safetensors", "m.safetensors.index.fp16.json"),
    ],
)
def test_the_name_of_an_index(first: str, index: str) -> None:
    assert index_name(first) == index
    assert variants_of([first, index], "m.safetensors").popitem()[1].index == index


def test_half_precision_is_downloaded_only_where_there_is_no_full_one() -> None:
    full, half = [[f"{part}/{stem}{variant}.safetensors" for part, stem in PARTS.items()] for variant in ("", ".fp16")]
    small = ["model_index.json", "unet/config.json", "tokenizer/merges.txt"]
    others = ["v1-5.safetensors", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors"]
    assert wanted_files([*small, *full, *half, *others]) == [*small, *full]
    assert wanted_files([*small, *half, *others]) == [*small, *half]


def test_what_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: ["unet/x.json", "unet/x.bin"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path))
    assert Base.open("owner/asked-2.1").path == tmp_path
    assert asked == {"allow_patterns": ["unet/x.json"]}


@pytest.mark.parametrize("name", ["owner/model-1.0", "SG161222/RealVisXL_V4.0", "stabilityai/sd-turbo"])
def test_an_id_of_the_hub_is_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no such folder here, and the hub did not give it"):
        Base.open(name)


def test_a_file_that_is_read_as_text_is_no_base(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    """A recipe's base is a string: a checkpoint of gigabytes is not parsed as if it were a configuration."""
    file = tmp_path / "class_path.safetensors"
    file.write_text("class_path: loratune.families.pixels.PixelDDPM\n")
    assert main(["data", str(recipe), "--model.base", str(file)]) == 2
    assert "no safetensors file" in capsys.readouterr().err
