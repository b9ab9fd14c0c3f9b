"""Encoded images and captions on disk, keyed by a hash of their inputs and checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loratune.errors import UserError
from loratune.formats.files import tensors_hash, write_safetensors

VERSION = 1  # of what the encoders here do to an image before the VAE sees it


def key_of(**made_from: str | int) -> str:
    """The key of an entry: a hash of all its inputs, so that a change never hits an old entry."""
    text = json.dumps({"version": VERSION, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """A folder of small safetensors files, each written whole or not at all and read by memory map.

    Several processes may share it: an entry's content follows from its name.

    Args:
        folder: where; made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def path(self, key: str) -> Path:
        """Where an entry lies, or would lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            write_safetensors(
                path, contiguous, {"sha256": tensors_hash(contiguous)}, durable=False
            )  # checked when read
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write to {self.folder}: {error.strerror or error}") from error

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry, or None where there is none or where its bytes are not those that were written."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written: dict[str, Any] = file.metadata() or {}
        except (FileNotFoundError, SafetensorError, OSError):
            return None
        return tensors if written.get("sha256") == tensors_hash(tensors) else None
