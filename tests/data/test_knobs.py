"""Each knob of the data does what it says, down to what the training gets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from loratune.cli.main import main
from loratune.data.augment import Augment
from loratune.data.buckets import Buckets
from loratune.data.captions import Captions
from loratune.data.module import CaptionedImages
from loratune.data.settings import SourceConfig
from loratune.errors import UserError
from loratune.formats.images import normalise, to_tensor
from loratune.lora.inject import LoRA
from loratune.training.lora_module import LoRAModule

SIZE = 16


def image(width: int, height: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def fill(folder: Path, sizes: list[tuple[int, int]], caption: str = "thing {}", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        image(width, height, seed + number).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption.format(number))
    return folder


@pytest.fixture(scope="module")
def module(tiny_base: Path) -> LoRAModule:
    return LoRAModule(str(tiny_base), LoRA(rank=2)).eval()


@pytest.fixture
def make(module: LoRAModule, tmp_path: Path) -> Callable[..., CaptionedImages]:
    def made(*, base: Any = module, **given: Any) -> CaptionedImages:
        usual: dict[str, Any] = {
            "resolution": SIZE,
            "batch_size": 4,
            "cache_dir": tmp_path / "cache",
            "validation_percent": 0,
        }
        data = CaptionedImages(**{**usual, **given})
        stand = SimpleNamespace(lightning_module=base, strategy=SimpleNamespace(root_device=torch.device("cpu")))
        stand.is_global_zero, stand.global_rank, stand.world_size = True, 0, 1
        data.trainer = stand  # type: ignore[assignment]
        data.setup("fit")
        return data

    return made


def epochs(data: CaptionedImages, count: int) -> list[dict[str, Any]]:
    """The batches of some epochs."""
    found: list[dict[str, Any]] = []
    for epoch in range(count):
        loader: Any = data.train_dataloader()
        loader.order.epoch = epoch
        found += list(loader)
    return found


def rows(batches: list[dict[str, Any]], key: str) -> list[tuple[str, Any]]:
    return [(name, value) for batch in batches for name, value in zip(batch["name"], batch[key], strict=True)]


# Buckets.


def test_images_keep_about_their_shape_in_batches_of_one_size(
    make: Callable[..., CaptionedImages], tmp_path: Path
) -> None:
    sizes = [(32, 32)] * 3 + [(40, 20)] * 5 + [(20, 40)] * 2
    folder = str(fill(tmp_path / "p", sizes))
    found = epochs(make(path=folder, buckets=Buckets(step=8, smallest=8, largest=32)), 1)
    shapes = {name: tuple(mean.shape[-2:]) for name, mean in rows(found, "mean")}
    assert len(shapes) == 10
    wanted = {(32, 32): (8, 8), (40, 20): (4, 12), (20, 40): (12, 4)}  # latents, height first, of 256 pixels at most
    assert shapes == {f"{at:02d}.png": wanted[size] for at, size in enumerate(sizes)}
    assert sorted(len(batch["name"]) for batch in found) == [1, 2, 3, 4]
    assert {tuple(mean.shape[-2:]) for _, mean in rows(epochs(make(path=folder), 1), "mean")} == {(8, 8)}


def test_sdxl_is_told_sizes_and_corners(
    make: Callable[..., CaptionedImages], tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdxl = LoRAModule(str(tiny_sdxl), LoRA(rank=2)).eval()
    fill(tmp_path / "p", [(64, 32)])
    data = make(base=sdxl, path=str(tmp_path / "p"), augment=Augment(crops=3), batch_size=1)
    told = {tuple(value.tolist()) for _, value in rows(epochs(data, 20), "sizes")}
    assert told == {(32, 64, 0, left, 16, 16) for left in (0, 8, 16)}
    batch = next(iter(data.train_dataloader()))
    seen: list[Any] = []
    forward = sdxl.model.network.forward

    def kept(*args: Any, **given: Any) -> Any:
        seen.append(given["added_cond_kwargs"]["time_ids"])
        return forward(*args, **given)

    monkeypatch.setattr(sdxl.model.network, "forward", kept)
    sdxl.losses(batch, torch.tensor([5]), torch.Generator().manual_seed(0), sdxl.objective)
    assert torch.equal(seen[0], batch["sizes"])


# Sources.


def test_sources_have_their_own_repeats_prefixes_and_roles(
    make: Callable[..., CaptionedImages], tmp_path: Path
) -> None:
    fill(tmp_path / "her", [(16, 16)] * 3, "sitting {}", 1)
    fill(tmp_path / "people", [(16, 16)] * 30, "someone {}", 50)
    fill(tmp_path / "check", [(16, 16)] * 2, "standing {}", 100)
    sources = [
        SourceConfig(str(tmp_path / "her"), caption_prefix="sks woman, ", repeats=4),
        SourceConfig(str(tmp_path / "people"), role="regularization", caption_prefix="a woman, ", loss_weight=0.5),
        SourceConfig(str(tmp_path / "check"), role="validation", caption_prefix="sks woman, "),
    ]
    data = make(sources=sources, validation_percent=50)
    own = [caption for _, caption in rows(epochs(data, 1), "caption") if caption.startswith("sks")]
    assert len(data.held_out.entries) >= 2  # type: ignore[union-attr]
    trained = [entry for entry in data.training.entries if entry.source == 0]  # type: ignore[union-attr]
    assert set(Counter(own).values()) == {4}
    assert len(own) == 4 * len(trained)
    kept = [(caption, weight) for batch in epochs(data, 1) for caption, weight in _weights(batch)]
    assert {weight for caption, weight in kept if caption.startswith("sks")} == {1.0}
    assert {weight for caption, weight in kept if caption.startswith("a woman, someone")} == {0.5}
    assert sum(weight == 0.5 for _, weight in kept) == len(own)  # as many as there are others
    class_images = {caption for _, caption in rows(epochs(data, 12), "caption") if caption.startswith("a woman")}
    assert len(class_images) == 30  # none of them is held out, and each comes in time
    assert {entry.source for entry in data.held_out.entries} <= {0, 2}  # type: ignore[union-attr]
    standing = [entry.caption for entry in data.held_out.entries if entry.source == 2]  # type: ignore[union-attr]
    assert standing == ["sks woman, standing 0", "sks woman, standing 1"]


def _weights(batch: dict[str, Any]) -> list[tuple[str, float]]:
    return list(zip(batch["caption"], batch["loss_weight"].tolist(), strict=True))


def test_weights_share_the_epoch_and_zero_leaves_a_source_out(
    make: Callable[..., CaptionedImages], tmp_path: Path
) -> None:
    fill(tmp_path / "few", [(16, 16)] * 2, "few {}", 1)
    fill(tmp_path / "many", [(16, 16)] * 12, "many {}", 20)
    sources = [SourceConfig(str(tmp_path / "few"), weight=0.5), SourceConfig(str(tmp_path / "many"), weight=1.0)]
    counted = Counter(text.split()[0] for _, text in rows(epochs(make(sources=sources), 1), "caption"))
    assert counted == {"few": 6, "many": 12}
    gone = SourceConfig(str(tmp_path / "nowhere"), weight=0.0)
    assert len(make(sources=[*sources, gone]).sources) == 2


def test_a_loss_weight_weighs_the_loss(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "a", [(16, 16)] * 4, "a {}", 1)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1))
    monkeypatch.setattr(module, "_generator", lambda *_: torch.Generator().manual_seed(4))
    losses = []
    for weight in (1.0, 0.25):
        data = make(sources=[SourceConfig(str(tmp_path / "a"), loss_weight=weight)])
        losses.append(float(module.training_step(next(iter(data.train_dataloader())), 0)))
    assert losses[1] == pytest.approx(losses[0] / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["empty", "gone"])
def test_an_empty_source_is_named(make: Callable[..., CaptionedImages], tmp_path: Path, kind: str) -> None:
    fill(tmp_path / "a", [(16, 16)] * 4)
    (tmp_path / "b").mkdir()
    if kind == "gone":
        (tmp_path / "b" / "1.png").write_bytes(b"no image")
        (tmp_path / "b" / "1.txt").write_text("a")
    with pytest.raises(UserError, match=r"/b: (no images in this folder|no image is left)"):
        make(sources=[SourceConfig(str(tmp_path / "a")), SourceConfig(str(tmp_path / "b"))])


# Captions.


def test_one_of_several_captions_is_told_and_encoded(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule
) -> None:
    fill(tmp_path / "p", [(16, 16)] * 2, "long {0}\nshort {0}")
    data = make(path=str(tmp_path / "p"), captions=Captions(lines=True), caption_prefix="in ink, ", batch_size=1)
    told: dict[str, set[str]] = {}
    for batch in epochs(data, 12):
        told.setdefault(batch["name"][0], set()).add(batch["caption"][0])
        with torch.no_grad():
            assert torch.equal(batch["condition"]["text"], module.model.encode_prompts(batch["caption"])["text"])
    assert told == {f"0{n}.png": {f"in ink, long {n}", f"in ink, short {n}"} for n in (0, 1)}
    first = make(path=str(tmp_path / "p"), captions=Captions(lines=True, choose="first"))
    assert {text for _, text in rows(epochs(first, 6), "caption")} == {"long 0", "long 1"}


def test_shuffled_tags_are_encoded_when_they_come(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule
) -> None:
    fill(tmp_path / "p", [(16, 16)] * 4, "n{}, red, round, small")
    data = make(
        path=str(tmp_path / "p"),
        captions=Captions(shuffle_tags=True, keep_tokens=1, tag_dropout=0.2),
        caption_prefix="sks, ",
    )
    found = epochs(data, 8)
    told = [text for _, text in rows(found, "caption")]
    assert len(set(told)) > 12
    assert all(text.startswith("sks, n") for text in told)
    assert all("condition" not in batch for batch in found)
    with torch.no_grad():
        given = module._condition(found[0], None)["text"]
        assert torch.equal(given, module.model.encode_prompts(found[0]["caption"])["text"])
    assert told == [text for _, text in rows(epochs(data, 8), "caption")]  # from seed and epoch alone


# Augmentation.


def test_mirrored_images_are_variants_in_the_cache(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counted = fill(tmp_path / "p", [(16, 16)] * 4), []
    encode = module.model.encode_images
    monkeypatch.setattr(module.model, "encode_images", lambda pixels: counted.append(len(pixels)) or encode(pixels))
    data = make(path=str(folder), augment=Augment(flip=0.5))
    assert sum(counted) == 8
    seen: dict[str, set[bytes]] = {}
    for name, mean in rows(epochs(data, 10), "mean"):
        seen.setdefault(name, set()).add(mean.numpy().tobytes())
    with torch.no_grad():
        for name, found in seen.items():
            opened = Image.open(folder / name)
            both = [encode(normalise(to_tensor(one))[None])["mean"][0] for one in (opened, ImageOps.mirror(opened))]
            assert found == {one.numpy().tobytes() for one in both}
    make(path=str(folder), augment=Augment(flip=0.5))
    assert sum(counted) == 8  # nothing was encoded again


def test_validation_does_not_vary(make: Callable[..., CaptionedImages], tmp_path: Path) -> None:
    folder = str(fill(tmp_path / "p", [(32, 16)] * 12, "a {0}, b, c\nx"))
    varied = {"augment": Augment(flip=1.0, crops=3), "captions": Captions(lines=True, shuffle_tags=True)}
    data, plain = (make(path=folder, validation_percent=40, **more) for more in (varied, {}))
    first, second = (list(one.val_dataloader()) for one in (data, data))
    assert [text for _, text in rows(first, "caption")] == [text for _, text in rows(second, "caption")]
    assert all(text.startswith("a ") and text.endswith(", b, c") for _, text in rows(first, "caption"))
    assert first
    for mine, theirs in zip(first, plain.val_dataloader(), strict=True):
        assert torch.equal(mine["mean"], theirs["mean"])


def test_colours_change_where_images_are_encoded_on_the_fly(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule
) -> None:
    folder = str(fill(tmp_path / "p", [(16, 16)] * 4))
    with pytest.raises(ValueError, match=r"data\.augment\.brightness is 0\.3: .*set data\.cache_latents: false"):
        make(path=folder, augment=Augment(brightness=0.3))
    plain, varied = (
        make(path=folder, cache_latents=False, augment=augment) for augment in (Augment(), Augment(brightness=0.3))
    )
    assert not [file for file in (tmp_path / "cache").rglob("*.safetensors") if b"logvar" in file.read_bytes()]
    cached = dict(rows(epochs(make(path=folder), 1), "mean"))
    batch = plain.on_after_batch_transfer(next(iter(plain.train_dataloader())), 0)
    for name, mean in rows([batch], "mean"):
        assert torch.allclose(mean, cached[name], atol=1e-6)
    sums: dict[str, set[float]] = {}
    for name, pixels in rows(epochs(varied, 6), "pixels"):
        sums.setdefault(name, set()).add(float(pixels.float().sum()))
    assert all(len(one) == 6 for one in sums.values())


# Masks.


@pytest.mark.parametrize("fly", [False, True])
def test_masks_reach_the_loss(
    make: Callable[..., CaptionedImages],
    tmp_path: Path,
    module: LoRAModule,
    fly: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = fill(tmp_path / "p", [(32, 16)] * 3)
    (tmp_path / "m").mkdir()
    half = np.zeros((16, 32), dtype=np.uint8)
    half[:, 16:] = 255
    for name in ("00.png", "01.png"):
        Image.fromarray(half).save(tmp_path / "m" / name)
    source = SourceConfig(str(folder), masks=tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        data = make(sources=[source], batch_size=3, augment=Augment(flip=1.0), cache_latents=not fly)
    assert "1 images have no mask and count whole: 02.png" in caplog.text
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    masks = dict(rows([batch], "mask"))
    assert float(masks["02.png"].min()) == 1
    width = masks["00.png"].shape[-1]
    assert masks["00.png"][0, 0].tolist() == [1.0] * (width // 2) + [0.0] * (width // 2)  # mirrored with its image
    where = batch["name"].index("00.png")
    losses = []
    for change in (0.0, 5.0):  # what lies under the mask is not seen by the loss but through x_t
        moved = dict(batch)
        moved["mask"] = batch["mask"].clone()
        moved["mask"][where] *= change == 0
        with torch.no_grad():
            losses.append(
                module.losses(moved, torch.tensor([5] * 3), torch.Generator().manual_seed(0), module.objective)[where]
            )
    assert losses[0] != losses[1]


def test_a_mask_of_another_size_and_a_step_that_does_not_fit_are_told_before_weights_are_read(
    recipe: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratune.training import diffusion_module

    monkeypatch.setattr(diffusion_module, "load_model", lambda *_: 1 / 0)
    (tmp_path / "m").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "m" / "00.png")

    def said(*words: str) -> str:
        assert main(["fit", "-c", str(recipe), *words]) == 2
        lines: list[str] = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "run").exists()
        return lines[-1]

    source = f"[{{path: {images}, masks: {tmp_path / 'm'}}}]"
    assert "00.png differ in size (8 x 8 and 16 x 16 pixels)" in said("--data.path", "null", "--data.sources", source)
    buckets = ["--data.buckets", "{step: 3, smallest: 3, largest: 30}"]
    assert "data.buckets.step: size 3: the VAE needs a multiple of 2; change data.buckets.step" in said(*buckets)
    assert "data.resolution: size 17: the VAE needs a multiple of 2" in said("--data.resolution", "17")
    (tmp_path / "empty").mkdir()
    empty = f"[{{path: {images}}}, {{path: {tmp_path / 'empty'}}}]"
    assert "empty: no images in this folder" in said("--data.path", "null", "--data.sources", empty)
    zero = f"[{{path: {images}, weight: 0}}]"
    assert "weight is 0 for every source" in said("--data.path", "null", "--data.sources", zero)
    assert "data.path is" in said("--data.sources", zero)
    for key, value in (("captions.shuffle_tags", "true"), ("cache_latents", "false")):
        told = said("--model.memory.unload_encoders", "true", f"--data.{key}", value)
        assert f"model.memory.unload_encoders is true, but data.{key.partition('.')[0]}" in told
    for file in images.glob("metadata.*"):
        file.unlink()
    assert "12 of 12 images have no caption" in said()


# What is encoded.


def test_an_encoding_that_was_stopped_goes_on_where_it_was(
    make: Callable[..., CaptionedImages], tmp_path: Path, module: LoRAModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, encode, counted = fill(tmp_path / "p", [(16, 16)] * 6), module.model.encode_images, []

    def limited(pixels: torch.Tensor) -> Any:
        if len(counted) == 4:
            raise KeyboardInterrupt
        counted.append(1)
        return encode(pixels)

    monkeypatch.setattr(module.model, "encode_images", limited)
    with pytest.raises(KeyboardInterrupt):
        make(path=str(folder))
    counted.clear()
    make(path=str(folder))
    assert len(counted) == 2


def test_workers_decode_and_give_the_same(make: Callable[..., CaptionedImages], tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", [(16, 16), (40, 16), (16, 16), (20, 20)])
    (folder / "02.png").write_bytes(b"no image")
    here, there = (
        make(path=str(folder), num_workers=workers, cache_dir=tmp_path / f"cache-{workers}", augment=Augment(flip=0.5))
        for workers in (0, 2)
    )
    assert here.training.entries == there.training.entries  # type: ignore[union-attr]
    assert here.unreadable == there.unreadable == [str(folder / "02.png")]
    for mine, theirs in zip(epochs(here, 2), epochs(there, 2), strict=True):
        assert mine["name"] == theirs["name"]
        assert torch.equal(mine["mean"], theirs["mean"])
