"""Masks beside images: where they are black, the loss counts nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loratune.data.augment import cut, upright_size
from loratune.data.buckets import Size
from loratune.data.entries import View
from loratune.data.samples import IMAGE_SUFFIXES, Sample
from loratune.errors import UserError
from loratune.formats.images import open_image


class Masks:
    """A folder of masks, each of its image's name, in any kind of image.

    Args:
        folder: where they are.
        path: of the source whose images they belong to, for messages.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.path = folder.expanduser(), path
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the masks of {path} for data.sources.masks")

    def find(self, sample: Sample) -> Path | None:
        """The file of an image's mask, or None where it has none.

        Raises:
            UserError: the images are no files in a folder, so they have no names to find masks by.
        """
        if not sample.root:
            raise UserError(f"{self.path}: its images have no file names, so masks cannot be found; use a folder")
        own = self.folder / Path(sample.name).relative_to(sample.root)
        return next((file for kind in sorted(IMAGE_SUFFIXES) if (file := own.with_suffix(kind)).is_file()), None)

    def read(self, sample: Sample, size: Size) -> bytes | None:
        """The bytes of an image's mask, or None where it has none.

        Args:
            sample: the image.
            size: its width and height, upright.

        Raises:
            UserError: the mask is unreadable or of another size.
        """
        if (file := self.find(sample)) is None:
            return None
        try:
            data = file.read_bytes()
            own = upright_size(data)
        except OSError as error:
            raise UserError(f"{file}: this mask is unreadable ({error}); mend or remove it") from None
        if own != size:
            sizes = f"{own[0]} x {own[1]} and {size[0]} x {size[1]} pixels"
            raise UserError(f"{file}: this mask and its image {sample.name} differ in size ({sizes}); make them alike")
        return data


def digest_of(data: bytes | None) -> str:
    """sha256 of a mask's bytes; empty where there is none."""
    return "" if data is None else hashlib.sha256(data).hexdigest()


def mask_tensor(data: bytes | None, bucket: Size, view: View) -> Tensor:
    """How much each pixel of a view counts, (1, H, W) in [0, 1]; 1 everywhere where there is no mask.

    Raises:
        OSError: the mask is unreadable.
    """
    if data is None:
        return torch.ones(1, bucket[1], bucket[0])
    grey: Image.Image = cut(open_image(data).convert("L"), bucket, view)
    return torch.from_numpy(np.array(grey, dtype=np.float32) / 255)[None]
