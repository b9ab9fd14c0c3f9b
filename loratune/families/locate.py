"""The folder or file that a base's name stands for: embedded, on disk, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from loratune.errors import UserError
from loratune.families.known import parts
from loratune.families.weight_files import choose, variants_of
from loratune.formats.headers import PICKLE_SUFFIXES

ASSETS = Path(__file__).parent.parent / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMS = "builtin:NAME, a diffusers folder, a .safetensors file, or a hub id such as owner/model"


def builtin_names() -> list[str]:
    """Names of the embedded bases."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def locate(name: str) -> Path:
    """The folder or file that a base's name stands for.

    Args:
        name: `builtin:NAME`, a diffusers folder, a `.safetensors` file, or a hub id such as `owner/model`.

    Raises:
        UserError: there is no such base, or it is a pickle.
    """
    if name.startswith("builtin:"):
        if name.removeprefix("builtin:") not in builtin_names():
            raise UserError(f"base {name}: there is no such embedded base; there is {builtin_names()}")
        return ASSETS / name.removeprefix("builtin:")
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"{path}: a pickle can run any code when it is opened; only .safetensors files are loaded")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path}: no model_index.json, so this is no diffusers folder")
    if path.exists():
        return path
    if path.suffix.lower() == ".safetensors" or not HUB_ID.fullmatch(name):
        raise UserError(f"base {name}: no such file or folder; give {FORMS}")
    return _download(name)


@cache
def _download(name: str) -> Path:
    """The snapshot of a hub's model: from the hub, or what is in the local cache where the hub cannot be reached."""
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted_files(list_repo_files(name))))
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        with suppress(Exception):
            return Path(snapshot_download(name, local_files_only=True))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"base {name}: no such folder here, and the hub did not give it: {reason}") from error


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of the files of a repository, those that a base is opened from: of each component, one precision.

    Args:
        names: of all files, with `/` between folders.
    """
    names = list(names)
    variants_by_part = {
        part: variants_of((file.rpartition("/")[2] for file in names if file.startswith(f"{part}/")), weights)
        for part, weights in ((place.name, place.file) for place in parts().values())
    }
    chosen = choose({part: variants for part, variants in variants_by_part.items() if variants})
    files = {f"{part}/{file}" for part, variant in chosen.items() for file in variants_by_part[part][variant].names}
    return [name for name in names if name in files or name.endswith((".json", ".txt"))]
