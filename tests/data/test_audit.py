"""Each fault of a recipe's images is found, by name; and where there is none, nothing is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loratune.data.audit import Audit, audit
from loratune.data.buckets import Buckets
from loratune.data.module import CaptionedImages
from loratune.data.order import BatchOrder
from loratune.data.settings import SourceConfig


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def put(folder: Path, name: str, seed: int, caption: str | None = "red, round", **size: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    noise(seed, **size).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images without a fault."""
    for seed in range(8):
        put(tmp_path / "p", f"{seed}.png", seed)
    return tmp_path / "p"


@pytest.fixture
def look(folder: Path) -> Callable[..., Audit]:
    def looked(room: int = 10, **given: Any) -> Audit:
        usual: dict[str, Any] = {} if "sources" in given else {"path": str(folder)}
        data = CaptionedImages(**usual, **{"resolution": 16, "batch_size": 3, "validation_percent": 0, **given})
        return audit(data.collection, 3, lambda text: len(text.split()), room, data.num_workers)

    return looked


def names(found: Audit, kind: str) -> list[str]:
    return [Path(name).name for one in found.findings if one.kind == kind for name in one.names]


def kinds(found: Audit) -> list[str]:
    return [one.kind for one in found.findings]


def test_where_nothing_is_wrong_only_counts_are_told(look: Callable[..., Audit], folder: Path) -> None:
    found = look()
    assert found.findings == ()
    (one,) = found.sources
    assert (one.path, one.role, one.images, one.held_out, one.drawn) == (str(folder), "training", 8, 0, 8)
    assert found.batches == 3
    assert found.buckets == {(16, 16): 8}
    assert found.tags == {"red": 8, "round": 8}


def test_counts_are_of_what_the_recipe_says(look: Callable[..., Audit], folder: Path, tmp_path: Path) -> None:
    for seed in range(20, 26):
        put(tmp_path / "class", f"{seed}.png", seed, "a dog", width=40, height=20)
    put(tmp_path / "held", "1.png", 50)
    sources = [
        SourceConfig(str(folder), repeats=2, caption_prefix="sks, "),
        SourceConfig(str(tmp_path / "class"), role="regularization"),
        SourceConfig(str(tmp_path / "held"), role="validation"),
    ]
    found = look(sources=sources, buckets=Buckets(step=8, smallest=8, largest=32))
    assert [(one.role, one.images, one.held_out, one.drawn) for one in found.sources] == [
        ("training", 8, 0, 16),
        ("regularization", 6, 0, 16),
        ("validation", 1, 1, 0),
    ]
    assert found.buckets == {(16, 16): 8, (24, 8): 6}
    assert found.batches == 6 + 6
    assert found.tags == {"red": 9, "round": 9, "a dog": 6}
    assert not found.findings


def test_unreadable_images(look: Callable[..., Audit], folder: Path) -> None:
    (folder / "2.png").write_bytes(b"nothing")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    found = look()
    assert [name.split(" (")[0] for name in names(found, "unreadable")] == ["2.png", "3.png"]
    assert found.sources[0].images == 6
    assert kinds(found)[0] == "unreadable"
    assert found.serious


def test_captions_that_are_missing_or_cut(look: Callable[..., Audit], folder: Path) -> None:
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_text("  ")
    (folder / "4.txt").write_text("one two three four five six seven eight nine ten eleven twelve")
    found = look()
    assert names(found, "no_caption") == ["2.png", "3.png"]
    assert names(found, "cut") == ["4.png (2 of its tokens)"]
    assert {one.kind for one in found.serious} == {"no_caption", "cut"}
    assert names(look(room=12), "cut") == []


def test_names_and_files_that_do_not_belong(look: Callable[..., Audit], folder: Path) -> None:
    (folder / "2.png").rename(folder / "2.jpg")
    noise(70).save(folder / "9.jpeg", "JPEG")
    (folder / "9.txt").write_text("red")
    (folder / "lost.txt").write_text("a caption of nothing")
    (folder / "new.heic").write_bytes(b"?")
    found = look()
    assert names(found, "ending") == ["2.jpg (is PNG)"]
    assert names(found, "no_image") == ["lost.txt"]
    assert names(found, "unread_kind") == ["new.heic"]
    assert not found.serious


def test_doubles_and_leaks(look: Callable[..., Audit], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    for source, name in (("2.png", folder / "twin.png"), ("3.png", tmp_path / "held" / "leak.png")):
        name.write_bytes((folder / source).read_bytes())
        name.with_suffix(".txt").write_text("red")
    noise(4, 20, 20).save(folder / "near.png")
    noise(5, 24, 24).save(tmp_path / "held" / "near-leak.png")
    for name in (folder / "near.txt", tmp_path / "held" / "near-leak.txt"):
        name.write_text("red")
    found = look(sources=[SourceConfig(str(folder)), SourceConfig(str(tmp_path / "held"), role="validation")])

    def ends(kind: str) -> list[list[str]]:
        told = [name for one in found.findings if one.kind == kind for name in one.names]
        return [[Path(part).name for part in name.split(" and ")] for name in told]

    assert ends("duplicate") == [["2.png", "twin.png"]]
    assert ends("leak") == [["3.png", "leak.png"]]
    assert ends("near_duplicate") == [["4.png", "near.png"]]
    assert ends("near_leak") == [["5.png", "near-leak.png"]]
    assert [one.kind for one in found.serious] == ["leak"]


def test_small_images(look: Callable[..., Audit], folder: Path) -> None:
    put(folder, "half.png", 60, width=10, height=16)
    put(folder, "tiny.png", 61, width=20, height=6)
    found = look()
    assert names(found, "upscaled") == ["half.png (1.60 times)"]
    assert names(found, "too_small") == ["tiny.png (2.67 times)"]


def test_masks_that_are_missing_or_do_not_fit(look: Callable[..., Audit], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for number in range(7):
        Image.new("L", (32, 32 if number else 30)).save(tmp_path / "m" / f"{number}.png")
    found = look(sources=[SourceConfig(str(folder), masks=tmp_path / "m")])
    assert names(found, "no_mask") == ["7.png"]
    (told,) = [name for one in found.findings if one.kind == "mask_wrong" for name in one.names]
    assert "0.png differ in size (32 x 30 and 32 x 32 pixels)" in told


def test_a_image_that_never_comes_is_found(look: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BatchOrder.__iter__
    monkeypatch.setattr(
        BatchOrder, "__iter__", lambda self: ([d for d in batch if d.sample != 4] for batch in whole(self))
    )
    assert names(look(), "lost") == ["4.png"]


def test_workers_find_the_same(look: Callable[..., Audit], folder: Path) -> None:
    (folder / "2.png").write_bytes(b"nothing")
    assert look(num_workers=2) == look()
