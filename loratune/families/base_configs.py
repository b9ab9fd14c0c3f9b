"""The configurations of a base: of its folder, or by the header of its single file; without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.families.architectures import architectures, describe_unsupported, detect
from loratune.families.family import Configs
from loratune.families.known import family_of, pipelines, supported
from loratune.formats.headers import Header

CONFIGS_KEY = "loratune.configs"


def file_configs(path: Path, header: Header) -> Configs:
    """The configurations of a single-file checkpoint, by its header.

    Raises:
        UserError: it is no checkpoint that is known.
    """
    if carried := header.metadata.get(CONFIGS_KEY):
        return _carried(path, carried)
    if name := detect(header):
        configs = architectures()[name]
        family = family_of(configs)
        configs["scheduler"] |= family.stated(header)
        return configs | {"model_index": {"_class_name": family.pipeline_of(configs)}}
    kind = describe_unsupported(header) or "not a checkpoint that is known here"
    raise UserError(f"{path}: {kind}; a base must be of {supported()}")


def _carried(path: Path, text: str) -> Configs:
    try:
        configs = json.loads(text)
        family = family_of(configs)
        whole = all(isinstance(configs[part], dict) for part in (*(part.name for part in family.parts), "scheduler"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        whole = False
    if not whole:
        raise UserError(f"{path}: its metadata {CONFIGS_KEY} is damaged; write the file again")
    return dict(configs)


def folder_configs(folder: Path) -> Configs:
    """The configurations of a diffusers folder; a part that the folder lacks has none.

    Raises:
        UserError: it is of a pipeline that is not supported, or a file of it is missing or no JSON.
    """
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in pipelines():
        raise UserError(f"{folder}: it is for {name}, which is not supported; there is {', '.join(pipelines())}")
    family = pipelines()[name]
    configs = {"model_index": {"_class_name": name}}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    there = [part.name for part in family.parts if part.role == "denoiser" or (folder / part.name).is_dir()]
    return configs | {part: read_json(folder / part / "config.json") for part in there}


def parts_of(configs: Configs) -> tuple[str, ...]:
    """The components with weights that a base of this family has when it is whole."""
    return tuple(part.name for part in family_of(configs).parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a base's folder.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the base is not complete") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
