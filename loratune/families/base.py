"""A base checkpoint, opened once: what it is, where its tensors lie, what it lacks, and its hash; without torch."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections import ChainMap
from collections.abc import Collection, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base_configs import CONFIGS_KEY, file_configs, folder_configs
from loratune.families.family import Configs, Family, Part, without_private
from loratune.families.known import FAMILIES, family_of
from loratune.families.locate import locate
from loratune.families.slots import Slot, held_in_file, held_in_folder, slots_of
from loratune.families.weight_files import WeightFiles, choose, shards_of, variants_of
from loratune.formats.headers import Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Base:
    """A checkpoint: a single file in the original layout, or a diffusers folder in any precision and in shards.

    Attributes:
        name: as the user gave it.
        path: of the file or folder.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.single = path.is_file()
        self._headers: dict[Path, Header] = {}

    @staticmethod
    def open(name: str) -> Base:
        """The base of a name; the same object again while its files stay as they are.

        Args:
            name: `builtin:NAME`, a diffusers folder, a `.safetensors` file, or a hub id such as `owner/model`.

        Raises:
            UserError: there is no such base, or it is a pickle.
        """
        path = locate(name)
        return _opened(name, path, _state(path))

    @cached_property
    def _read_configs(self) -> Configs:
        if not self.single:
            return folder_configs(self.path)
        header = self.header(self.path)
        configs = file_configs(self.path, header)
        if CONFIGS_KEY not in header.metadata:
            family_of(configs).complete(configs, header, self._values)
        return configs

    @property
    def configs(self) -> Configs:
        """The configurations of the scheduler and of every component that is there; a copy.

        Raises:
            UserError: it is no base that is known, or its configurations are damaged.
        """
        return copy.deepcopy(self._read_configs)

    def _values(self, key: str) -> Any:
        """A tensor of a single file as a flat numpy array in float64; none of what is no floating point number."""
        import numpy as np

        from loratune.formats.numbers import FLOATS, widened

        header = self.header(self.path)
        info = header.tensors[key]
        if info.dtype not in FLOATS:
            return np.empty(0)
        with self.path.open("rb") as file:
            file.seek(header.data_offset + info.start)
            raw = np.frombuffer(file.read(info.stop - info.start), np.uint8)
        return widened(raw, info.dtype, np.float64)

    @cached_property
    def family(self) -> Family:
        """What it is."""
        return family_of(self._read_configs)

    def _part(self, name: str) -> Part:
        return self.family.part(name)

    @property
    def title(self) -> str:
        """What it is called, for people."""
        return self.family.title_of(self._read_configs)

    @property
    def variant(self) -> str:
        """What it is for: text to image, or something that is not trained here, such as inpainting."""
        return self.family.variant(self._read_configs)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that are there."""
        return tuple(part.name for part in self.family.parts if part.name in self._read_configs)

    @property
    def missing(self) -> tuple[str, ...]:
        """The components that a whole base has and this one lacks."""
        return tuple(part.name for part in self.family.parts if part.name not in self._read_configs)

    def require_whole(self, why: str) -> None:
        """Raise UserError where a component is missing.

        Args:
            why: what needs them all, for the message.
        """
        if self.missing:
            raise UserError(f"{self.path}: has no {' and no '.join(self.missing)}; {why} needs a whole base")

    @cached_property
    def variants(self) -> dict[str, dict[str, WeightFiles]]:
        """The variants of its weights in a folder, by component; none for a component without safetensors files."""
        by_part = {part: variants_of(os.listdir(self.path / part), self._part(part).file) for part in self.parts}
        return {part: variants for part, variants in by_part.items() if variants}

    @cached_property
    def _chosen(self) -> dict[str, str]:
        chosen = choose(self.variants)
        names = list(dict.fromkeys(variant or "full" for variants in self.variants.values() for variant in variants))
        if len(names) > 1:
            read = list(dict.fromkeys(variant or "full" for variant in chosen.values()))
            log.warning("%s: holds weights in the variants %s; %s is read", self.path, ", ".join(names), *read[:1])
        return chosen

    def files(self, part: str) -> dict[Path, Header]:
        """The files that hold a component's weights, with their headers: of one precision, all its shards.

        Raises:
            UserError: there is none, a shard is missing, or one is damaged.
        """
        if self.single:
            return {self.path: self.header(self.path)}
        if part not in self._chosen:
            file = self.path / part / self._part(part).file
            raise UserError(f"{file}: there is no such file, nor a variant of it; only .safetensors files are loaded")
        paths = shards_of(self.path / part, self.variants[part][self._chosen[part]])
        return {path: self.header(path) for path in paths}

    def index(self, part: str) -> str | None:
        """The name of the file that lists the shards of a component's weights, if there is one."""
        return None if self.single else self.variants[part][self._chosen[part]].index

    def header(self, file: Path) -> Header:
        """The header of one of its files, read once.

        Raises:
            UserError: as `read_header`.
        """
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]

    @cached_property
    def layers(self) -> dict[str, Slot]:
        """Where the weights of the layers that a LoRA can adapt lie, by canonical name (`unet.conv_in`).

        Raises:
            UserError: one of them is missing, or has another size.
        """
        names = module_names(self._read_configs)
        parts = [part for part in self.parts if any(name.startswith(f"{part}.") for name in names)]
        slots = self._slots(parts, {f"{name}.weight" for name in names})
        return {name.removesuffix(".weight"): slot for name, slot in slots}

    @cached_property
    def tensors(self) -> dict[str, Slot]:
        """Where all its tensors lie, by canonical name with component (`unet.conv_in.weight`).

        Raises:
            UserError: one of them is missing, or has another size.
        """
        return dict(self._slots(self.parts, None))

    def _slots(self, parts: Collection[str], names: Collection[str] | None) -> Iterator[tuple[str, Slot]]:
        configs = {part: self._read_configs[part] for part in parts}
        if self.single:
            return slots_of(self.path, held_in_file(self.path, self.header(self.path)), configs, True, names)
        entries = held_in_folder({self._part(part): self.files(part) for part in parts})
        return slots_of(self.path, entries, configs, False, names)

    def read(self, name: str) -> Tensor:
        """A tensor by its canonical name with component, in its dtype and in the shape of its module.

        Raises:
            UserError: the file cannot be read.
        """
        from loratune.formats.files import read_part

        slot = self.tensors[name]
        shape = slot.shape[::-1] if slot.transposed else slot.shape
        start = self.header(slot.file).data_offset + slot.start
        value = read_part(slot.file, start, slot.stop - slot.start, slot.dtype, shape)
        return value.T if slot.transposed else value

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """All weights by component, under today's names, by memory map.

        Raises:
            UserError: a file is missing or damaged, or a single file has other tensors than its kind.
        """
        from loratune.families.single_file import canonical_keys, from_single_file
        from loratune.formats.files import read_tensors

        if self.single:
            return from_single_file(read_tensors(self.path), self.configs, self.path)
        files = {part: self.files(part) for part in self.parts}  # what is missing is said before anything is read
        read = {part: [read_tensors(file) for file in headers] for part, headers in files.items()}
        return {part: canonical_keys(self._part(part), dict(ChainMap(*tensors))) for part, tensors in read.items()}

    def hash(self) -> str:
        """sha256, in hex: of a single file's bytes, as sd-scripts has it; of a folder's configurations and weights.

        Raises:
            UserError: a file of it is missing or cannot be read.
        """
        if self.single:
            return _file_hash(self.path)
        digest = hashlib.sha256()
        for part in ("scheduler", *self.parts):
            digest.update(json.dumps([part, without_private(self._read_configs[part])], sort_keys=True).encode())
            for file in self.files(part) if part in self.parts else ():
                digest.update(_file_hash(file).encode())
        return digest.hexdigest()


def base_hash(name: str) -> str:
    """The hash of a base by its name; "" where nothing on disk has it, such as a base made in code."""
    try:
        return Base.open(name).hash()
    except UserError:
        return ""


State = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size (bytes) and time of change (ns) of every file that a base is opened from."""


def _state(path: Path) -> State:
    parts = {part.name for family in FAMILIES for part in family.parts}
    folders = (path, path / "scheduler", *(path / part for part in parts)) if path.is_dir() else ()
    files = [file for folder in folders for file in folder.glob("*") if file.is_file()] or [path]
    status = [(str(file), file.stat()) for file in sorted(files)]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in status)


@lru_cache(maxsize=8)
def _opened(name: str, path: Path, state: State) -> Base:
    return Base(name, path)


def _file_hash(file: Path) -> str:
    status = file.stat()
    return _hash(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(file: Path, size: int, changed: int) -> str:
    """A file's hash, taken anew when its size (bytes) or its time of change (ns) is another."""
    from loratune.formats.files import sha256_file

    return sha256_file(file)
