"""Images become batches: nothing is lost, nothing is encoded twice, and what is wrong is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from loratune.data.module import CaptionedImages, collate
from loratune.errors import UserError
from loratune.formats.images import normalise, open_image, square, to_tensor
from loratune.lora.inject import LoRA
from loratune.training.lora_module import LoRAModule

SIZE = 16


@pytest.fixture(scope="module")
def module(tiny_base: Path) -> LoRAModule:
    """One for all tests here: data modules only read it (what a test changes, it changes back)."""
    return LoRAModule(str(tiny_base), LoRA(rank=2)).eval()


class Calls:
    """How often the frozen parts were asked."""

    def __init__(self, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.texts = 0
        images, texts = family.encode_images, family.encode_prompts

        def encode_images(pixels: Tensor) -> dict[str, Tensor]:
            self.images += len(pixels)
            return images(pixels)

        def encode_prompts(captions: list[str]) -> dict[str, Tensor]:
            self.texts += len(captions)
            return texts(captions)

        monkeypatch.setattr(family, "encode_images", encode_images)
        monkeypatch.setattr(family, "encode_prompts", encode_prompts)

    def since(self) -> tuple[int, int]:
        """Images and captions encoded since last asked."""
        found = (self.images, self.texts)
        self.images = self.texts = 0
        return found


@pytest.fixture
def calls(module: LoRAModule, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(module.model, monkeypatch)


@pytest.fixture
def make(module: LoRAModule, images: Path, tmp_path: Path) -> Callable[..., CaptionedImages]:
    """A data module of the twelve images, set up by a trainer's stand-in."""

    def made(stand_in: Any = module, **changed: Any) -> CaptionedImages:
        given: dict[str, Any] = {
            "path": str(images),
            "resolution": SIZE,
            "batch_size": 4,
            "cache_dir": tmp_path / "cache",
        }
        data = CaptionedImages(**{**given, **changed})
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=stand_in,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            is_global_zero=True,
            global_rank=0,
            world_size=1,
            global_step=0,
            accumulate_grad_batches=1,
        )
        data.setup("fit")
        return data

    return made


def add_image(folder: Path, name: str, caption: str | None, shade: int = 0) -> None:
    image = Image.new("RGB", (SIZE, SIZE), (shade, 255 - shade, 40))
    ImageDraw.Draw(image).line((0, shade % SIZE, SIZE, 3), fill="white")
    image.save(folder / name)
    if caption is not None:
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def names(loader: Any) -> list[str]:
    return [name for batch in loader for name in batch["name"]]


def split(data: CaptionedImages) -> tuple[set[str], set[str]]:
    return set(names(data.train_dataloader())), set(names(data.val_dataloader()))


# The split.


@pytest.mark.parametrize("split_by", ["image", "caption"])
def test_the_split_stays_when_images_are_added(
    make: Callable[..., CaptionedImages], images: Path, split_by: str
) -> None:
    before = split(make(validation_percent=40, split_by=split_by))
    assert all(before)
    assert not before[0] & before[1]
    for number in range(20):
        add_image(images, f"{'a' if number % 2 else 'z'}{number}.png", f"a new line {number}", 12 * number)
    after = split(make(validation_percent=40, split_by=split_by))
    assert before[0] < after[0]
    assert before[1] < after[1]
    assert len(after[0] | after[1]) == 32
    assert not after[0] & after[1]


def test_the_split_is_of_images_or_of_captions(make: Callable[..., CaptionedImages], images: Path) -> None:
    by_image = split(make(validation_percent=40))
    by_caption = split(make(validation_percent=40, split_by="caption"))
    assert by_image != by_caption
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    rewritten = [json.dumps(line | {"text": line["text"] + "!"}) for line in lines]
    (images / "metadata.jsonl").write_text("\n".join(rewritten))
    assert split(make(validation_percent=40)) == by_image
    assert split(make(validation_percent=40, split_by="caption")) != by_caption
    for number, line in enumerate(lines):  # other images under the old captions: another style of the same things
        Image.new("RGB", (SIZE, SIZE), (20 * number, 0, 0)).save(images / line["file_name"])
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert split(make(validation_percent=40, split_by="caption")) == by_caption
    assert split(make(validation_percent=40)) != by_image


def test_a_prefix_does_not_move_the_split_by_caption(make: Callable[..., CaptionedImages]) -> None:
    plain = make(validation_percent=40, split_by="caption")
    assert split(make(validation_percent=40, split_by="caption", caption_prefix="in sks style, ")) == split(plain)


def test_nothing_is_held_out_at_0_percent(make: Callable[..., CaptionedImages]) -> None:
    data = make(validation_percent=0)
    assert data.val_dataloader() == []
    assert len(names(data.train_dataloader())) == 12


# The order.


@pytest.mark.parametrize("batch_size", [1, 4, 5, 50])
def test_no_image_is_lost_in_an_epoch(make: Callable[..., CaptionedImages], batch_size: int) -> None:
    data = make(validation_percent=40, batch_size=batch_size)
    trained = names(data.train_dataloader())
    held_out = names(data.val_dataloader())
    assert sorted(trained + held_out) == [f"{number:02d}.png" for number in range(12)]
    assert held_out == sorted(held_out)
    assert len(data.train_dataloader()) == -(-len(trained) // batch_size)


def test_the_order_follows_the_seed(make: Callable[..., CaptionedImages], monkeypatch: pytest.MonkeyPatch) -> None:
    data, orders = make(validation_percent=0), []
    for seed in ("0", "0", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append(tuple(names(data.train_dataloader())))
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


# What is wrong.


def test_a_missing_caption_is_an_error(make: Callable[..., CaptionedImages], images: Path) -> None:
    add_image(images, "bare.png", None)
    add_image(images, "blank.png", "  ")
    with pytest.raises(UserError, match=r"2 of 14 images have no caption: .*bare\.png, .*blank\.png") as error:
        make()
    assert "data.allow_missing_captions: true" in str(error.value)


def test_many_missing_captions_are_not_all_listed(make: Callable[..., CaptionedImages], images: Path) -> None:
    (images / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"12 of 12 images have no caption: .*09\.png and 2 more") as error:
        make()
    assert "10.png" not in str(error.value)


def test_missing_captions_can_be_allowed(
    make: Callable[..., CaptionedImages], images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_image(images, "bare.png", None)
    with caplog.at_level(logging.WARNING, "loratune"):
        data = make(allow_missing_captions=True, validation_percent=0)
    assert "1 of 13 images have no caption" in caplog.text
    assert "bare.png" in caplog.text
    captions = {
        name: text
        for batch in data.train_dataloader()
        for name, text in zip(batch["name"], batch["caption"], strict=True)
    }
    assert captions["bare.png"] == ""
    assert captions["00.png"] == "a red disc 0"


@pytest.fixture
def damaged(images: Path) -> Path:
    """The twelve images, two of them unreadable."""
    (images / "03.png").write_bytes((images / "03.png").read_bytes()[:60])
    (images / "07.png").write_bytes(b"no image at all")
    return images


def test_unreadable_images_are_counted_listed_and_left_out(
    make: Callable[..., CaptionedImages], damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "loratune"):
        data = make(validation_percent=0)
    assert [Path(name).name for name in data.unreadable] == ["03.png", "07.png"]
    assert "2 of 12 images are unreadable and left out" in caplog.text
    assert str(damaged / "03.png") in caplog.text
    assert str(damaged / "07.png") in caplog.text
    assert sorted(names(data.train_dataloader())) == [f"{i:02d}.png" for i in range(12) if i not in (3, 7)]


@pytest.mark.usefixtures("damaged")
def test_strict_stops_at_the_first_unreadable_image(make: Callable[..., CaptionedImages]) -> None:
    with pytest.raises(UserError, match=r"03\.png: unreadable"):
        make(strict=True)


def test_no_readable_image_is_an_error(make: Callable[..., CaptionedImages], images: Path) -> None:
    for file in images.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="images: no image is left to train on"):
        make()


def test_a_size_that_the_vae_cannot_take(make: Callable[..., CaptionedImages]) -> None:
    with pytest.raises(UserError, match="size 17: the VAE needs a multiple of 2"):
        make(resolution=17)


@pytest.mark.parametrize(
    ("key", "value"), [("resolution", 4), ("resolution", 10000), ("batch_size", 0), ("validation_percent", 51)]
)
def test_arguments_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key} is {value}"):
        CaptionedImages("somewhere", **{key: value})  # type: ignore[arg-type]


# What is cached.


def test_nothing_is_encoded_twice(make: Callable[..., CaptionedImages], calls: Calls) -> None:
    make()
    assert calls.since() == (12, 12)
    data = make(batch_size=3, validation_percent=40, num_workers=0)
    names(data.train_dataloader())
    names(data.val_dataloader())
    assert calls.since() == (0, 0)


def test_a_changed_image_is_encoded_again(make: Callable[..., CaptionedImages], images: Path, calls: Calls) -> None:
    make()
    calls.since()
    Image.new("RGB", (SIZE, SIZE), "yellow").save(images / "05.png")
    make()
    assert calls.since() == (1, 0)
    (images / "05.png").rename(images / "still-05.png")
    text = (images / "metadata.jsonl").read_text()
    (images / "metadata.jsonl").write_text(text.replace('"05.png"', '"still-05.png"'))
    make()
    assert calls.since() == (0, 0)  # the name is not what makes it


def test_a_changed_caption_is_encoded_again(make: Callable[..., CaptionedImages], images: Path, calls: Calls) -> None:
    make()
    calls.since()
    text = (images / "metadata.jsonl").read_text()
    (images / "metadata.jsonl").write_text(text.replace("a black disc 3", "a black ring"))
    make()
    assert calls.since() == (0, 1)
    make(caption_prefix="sks ")
    assert calls.since() == (0, 12)


def test_another_size_is_encoded_again(make: Callable[..., CaptionedImages], calls: Calls) -> None:
    make()
    calls.since()
    data = make(resolution=8)
    assert calls.since() == (12, 0)
    assert next(iter(data.train_dataloader()))["mean"].shape[2:] == (4, 4)


@pytest.mark.parametrize(("part", "wanted"), [("vae", (12, 0)), ("text_encoder", (0, 12)), ("unet", (0, 0))])
def test_other_weights_encode_again(
    make: Callable[..., CaptionedImages], module: LoRAModule, calls: Calls, part: str, wanted: tuple[int, int]
) -> None:
    make()
    calls.since()
    weight = next(module.model.components()[part].parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] += 0.25
    try:
        make()
        assert calls.since() == wanted
    finally:
        weight.data.copy_(before)
    make()
    assert calls.since() == (0, 0)


@torch.no_grad()
def test_the_cached_posterior_is_the_vaes_own(
    make: Callable[..., CaptionedImages], module: LoRAModule, images: Path
) -> None:
    for _ in range(2):  # encoded, and read from the cache
        batch = next(iter(make(validation_percent=0).train_dataloader()))
        for row, (name, caption) in enumerate(zip(batch["name"], batch["caption"], strict=True)):
            opened = square(open_image((images / name).read_bytes()), SIZE)
            moments = module.model.vae.encode(normalise(to_tensor(opened))[None]).latent_dist
            assert torch.equal(batch["mean"][row], moments.mean[0])
            assert torch.equal(batch["logvar"][row], moments.logvar[0])
            told = module.model.encode_prompts([caption])
            assert torch.equal(batch["condition"]["text"][row], told["text"][0])


def test_a_damaged_entry_is_encoded_again(make: Callable[..., CaptionedImages], calls: Calls, tmp_path: Path) -> None:
    first = next(iter(make(validation_percent=0).train_dataloader()))
    calls.since()
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(entries) == 24
    for entry in entries:
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    again = next(iter(make(validation_percent=0).train_dataloader()))
    assert calls.since() == (12, 12)
    assert torch.equal(first["mean"], again["mean"])
    assert torch.equal(first["condition"]["text"], again["condition"]["text"])
    entries[0].unlink()  # while a run goes on
    assert len(names(make().train_dataloader())) > 0
    assert sum(calls.since()) == 1


def test_captions_are_not_cached_while_the_text_encoder_is_trained(
    make: Callable[..., CaptionedImages], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = LoRAModule(str(tiny_base), LoRA(rank=2, text_encoder=True)).eval()
    counted = Calls(trained.model, monkeypatch)
    batch = next(iter(make(trained, caption_prefix="sks ").train_dataloader()))
    assert counted.since() == (12, 0)
    assert "condition" not in batch
    assert all(text.startswith("sks a ") for text in batch["caption"])


def test_a_model_of_pixels_gets_pixels(make: Callable[..., CaptionedImages], images: Path, tmp_path: Path) -> None:
    data = make(SimpleNamespace(batch_kind="pixels"), validation_percent=0, resolution=8)
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["caption", "name", "pixels"]
    assert batch["pixels"].dtype == torch.uint8
    opened = square(open_image((images / batch["name"][2]).read_bytes()), 8)
    assert torch.equal(batch["pixels"][2], to_tensor(opened))
    assert not (tmp_path / "cache").exists()


def test_unreadable_images_are_left_out_of_pixels_too(make: Callable[..., CaptionedImages], damaged: Path) -> None:
    data = make(SimpleNamespace(batch_kind="pixels"), validation_percent=0)
    assert len(names(data.train_dataloader())) == 10
    assert len(data.unreadable) == 2


def test_the_prefix_is_before_every_caption(make: Callable[..., CaptionedImages], module: LoRAModule) -> None:
    batch = next(iter(make(caption_prefix="in sks style, ").train_dataloader()))
    assert all(text.startswith("in sks style, a ") for text in batch["caption"])
    with torch.no_grad():
        assert torch.equal(batch["condition"]["text"][0], module.model.encode_prompts(batch["caption"][:1])["text"][0])


def test_collate_stacks_what_can_be_stacked() -> None:
    samples = [{"name": f"{i}", "caption": "c", "mean": torch.full((2,), i), "condition": {"text": torch.ones(3)}}
               for i in range(2)]  # fmt: skip
    batch = collate(samples)
    assert batch["name"] == ["0", "1"]
    assert batch["mean"].tolist() == [[0, 0], [1, 1]]
    assert batch["condition"]["text"].shape == (2, 3)


class Seen(L.Callback):
    """What a run was given."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.checked: list[str] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.trained += batch["name"]

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, index: int, dataloader_idx: int = 0
    ) -> None:
        self.checked += batch["name"]


def test_a_real_trainer_gets_each_image_once_an_epoch(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    data = CaptionedImages(
        str(images), resolution=SIZE, batch_size=4, validation_percent=25, cache_dir=tmp_path / "cache"
    )
    seen = Seen()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[seen],
    )
    trainer.fit(LoRAModule(str(tiny_base), LoRA(rank=2)), data)
    count = len(seen.trained) // 2
    first, second = seen.trained[:count], seen.trained[count:]
    assert sorted(first) == sorted(second)
    assert first != second
    half = len(seen.checked) // 2
    assert seen.checked[:half] == seen.checked[half:]
    assert sorted(first + seen.checked[:half]) == [f"{number:02d}.png" for number in range(12)]
