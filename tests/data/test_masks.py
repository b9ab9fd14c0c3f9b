"""Masks are found by name, fit their images, and take from the loss what is black."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loratune.data.entries import MIDDLE, View
from loratune.data.masks import Masks, digest_of, mask_tensor
from loratune.data.samples import Sample
from loratune.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Masks of 8 x 4 pixels, white at the left."""
    (tmp_path / "masks" / "deep").mkdir(parents=True)
    values = np.zeros((4, 8), dtype=np.uint8)
    values[:, :4] = 255
    Image.fromarray(values).save(tmp_path / "masks" / "a.png")
    Image.fromarray(values).convert("RGB").save(tmp_path / "masks" / "deep" / "b.webp", lossless=True)
    return tmp_path


def sample(folder: Path, name: str) -> Sample:
    return Sample(str(folder / "images" / name), b"", ("a",), str(folder / "images"))


def test_a_mask_has_its_images_name_below_its_folder(folder: Path) -> None:
    masks = Masks(folder / "masks", "images")
    assert masks.find(sample(folder, "a.jpg")) == folder / "masks" / "a.png"
    assert masks.find(sample(folder, "deep/b.png")) == folder / "masks" / "deep" / "b.webp"
    assert masks.find(sample(folder, "b.png")) is None
    assert masks.read(sample(folder, "b.png"), (8, 4)) is None
    assert masks.read(sample(folder, "a.jpg"), (8, 4)) == (folder / "masks" / "a.png").read_bytes()


def test_what_is_wrong_with_masks_is_told(folder: Path) -> None:
    masks = Masks(folder / "masks", "images")
    said = r"a\.png: this mask and its image .*a\.jpg differ in size \(8 x 4 and 4 x 8 pixels\); make them alike"
    with pytest.raises(UserError, match=said):
        masks.read(sample(folder, "a.jpg"), (4, 8))
    (folder / "masks" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png: this mask is unreadable"):
        masks.read(sample(folder, "a.jpg"), (8, 4))
    with pytest.raises(UserError, match="no such folder; give the masks of images"):
        Masks(folder / "nothing", "images")
    with pytest.raises(UserError, match="have no file names, so masks cannot be found"):
        masks.find(Sample("set.parquet, row 3", b"", ("a",)))


def test_a_mask_is_cut_as_its_image_is(folder: Path) -> None:
    data = (folder / "masks" / "a.png").read_bytes()
    assert mask_tensor(data, (8, 4), MIDDLE)[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert mask_tensor(data, (8, 4), View(flip=True))[0, 0].tolist() == [0.0] * 4 + [1.0] * 4
    assert mask_tensor(data, (4, 4), View(0.0)).min() == 1
    assert mask_tensor(data, (4, 4), View(1.0)).max() == 0
    assert torch.equal(mask_tensor(None, (6, 2), MIDDLE), torch.ones(1, 2, 6))
    assert digest_of(None) == ""
    assert len(digest_of(data)) == 64
