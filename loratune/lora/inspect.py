"""What a file is. A checkpoint is told by its header alone, at once and without torch; a LoRA's tensors are read."""

from __future__ import annotations

import json as jsons
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import UserError
from loratune.families.architectures import architectures, describe_unsupported, detect
from loratune.families.base import Base
from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.known import family_of
from loratune.formats.headers import Header, read_header
from loratune.lora.fits import fitting, layer_names
from loratune.lora.keys import unread
from loratune.lora.readers import REFUSED, WHOLE, Keys, read_keys, verdicts
from loratune.lora.tables.known import detect_format
from loratune.lora.tables.table import DOWN

if TYPE_CHECKING:
    from loratune.lora.file import LoRAFile

OURS = "loratune."
# What of sd-scripts' metadata tells about the training, by what people call it.
TRAINING = {
    "base model": ("ss_sd_model_name", "ss_base_model_version"),
    "trained by": ("ss_network_module",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "images": ("ss_num_train_images",),
    "resolution": ("ss_resolution",),
    "learning rate": ("ss_learning_rate",),
    "of the U-Net": ("ss_unet_lr",),
    "of the text encoder": ("ss_text_encoder_lr",),
    "optimizer": ("ss_optimizer",),
    "schedule": ("ss_lr_scheduler",),
    "clip skip": ("ss_clip_skip",),
    "min-SNR gamma": ("ss_min_snr_gamma",),
    "noise offset": ("ss_noise_offset",),
    "precision": ("ss_mixed_precision",),
    "seed": ("ss_seed",),
    "comment": ("ss_training_comment",),
}
# Text widths of the bases, where a LoRA's own names cannot be read.
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


def describe(file: Path) -> dict[str, Any]:
    """What a file, or a diffusers folder, is.

    Raises:
        UserError: it cannot be read.
    """
    if file.is_dir():
        return describe_folder(file)
    header = read_header(file)
    return describe_lora(file, header) if detect_format(header.tensors) else describe_checkpoint(file, header)


def describe_checkpoint(file: Path, header: Header) -> dict[str, Any]:
    """Family, variant, size, dtypes, merges and metadata of a checkpoint, from its header alone."""
    name = detect(header)
    own = CONFIGS_KEY in header.metadata
    facts: dict[str, Any] = {"file": str(file)}
    if name:
        configs = architectures()[name]
        family = family_of(configs)
        facts |= {"kind": "checkpoint", "family": family.title_of(configs), "architecture": name}
        facts["variant"] = family.variant(configs)
        facts["prediction"] = family.stated(header).get("prediction_type", "not told by the file")
        facts["layout"] = f"single file ({family.name})"
    elif own:
        facts |= {"kind": "checkpoint", "family": "Stable Diffusion, in sizes of its own that it carries with it"}
    else:
        facts["kind"] = unread(header.tensors) or describe_unsupported(header) or "not a file that is known here"
    facts |= _of_headers([header])
    merged = {key: _parsed(value) for key, value in header.metadata.items() if "merge" in key.lower()}
    rest = {key: value for key, value in header.metadata.items() if key != CONFIGS_KEY and key not in merged}
    return facts | {"merged": merged, "metadata": rest}


def describe_folder(folder: Path) -> dict[str, Any]:
    """Family and components of a diffusers folder, from its configurations and headers alone.

    Raises:
        UserError: it is no diffusers folder, or one that is not supported or whose weights are not complete.
    """
    base = Base.open(str(folder))
    configs = base.configs
    headers = {part: list(base.files(part).values()) for part in base.parts}
    return {
        "file": str(folder),
        "kind": "checkpoint",
        "family": base.title,
        "variant": base.variant,
        "prediction": configs["scheduler"].get("prediction_type", "not told by the folder"),
        "layout": f"diffusers folder ({configs['model_index']['_class_name']})",
        "size": f"{sum(header.size for some in headers.values() for header in some):,} bytes",
        "missing": list(base.missing),
        "components": {part: _of_headers(some) for part, some in headers.items()},
        "merged": {
            part: header.metadata
            for part, some in headers.items()
            for header in some
            if "loratune.merged" in header.metadata
        },
    }


def _of_headers(headers: Sequence[Header]) -> dict[str, Any]:
    counts = Counter(info.dtype for header in headers for info in header.tensors.values())
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in counts.items())
    shards = {"files": len(headers)} if len(headers) > 1 else {}
    return {"tensors": counts.total(), "size": f"{sum(header.size for header in headers):,} bytes, {dtypes}", **shards}


def describe_lora(file: Path, header: Header) -> dict[str, Any]:
    """Kind, format, family, sizes, readers, norms and training of a LoRA.

    Raises:
        UserError: its tensors cannot be read at all.
    """
    keys = read_keys(file, header, layer_names())
    lora, problem = _read(file)
    facts: dict[str, Any] = {"file": str(file), "kind": _kind(keys), "format": keys.format or "not known"}
    facts["family"] = _family(keys, header, lora)
    if lora is not None:
        alphas = {layer.alpha for layer in lora.layers.values()}
        facts |= {"rank": sorted({layer.rank for layer in lora.layers.values()}), "alpha": sorted(alphas)}
    else:
        facts |= {"rank": sorted(set(keys.ranks.values())), "alpha": sorted(set(keys.alphas.values()))}
    facts |= {
        "layers": len(lora.layers if lora else keys.layers),
        "targets": _targets(lora.layers if lora else keys.layers),
    }
    facts |= _of_headers([header])
    ours = {"loads": WHOLE, "notes": []} if problem is None else _refusal(problem)
    facts["readers"] = {"loratune": ours, **verdicts(keys)}
    facts |= _numbers(file, header, lora)
    facts |= {"training": _training(header.metadata)}
    carried = {key.removeprefix(OURS): value for key, value in header.metadata.items() if key.startswith(OURS)}
    rest = {key: value for key, value in header.metadata.items() if not key.startswith((OURS, "lora_adapter"))}
    return {**carried, **facts} | {"metadata": rest}


def _read(file: Path) -> tuple[LoRAFile | None, str | None]:
    from loratune.lora.file import read_lora

    try:
        return read_lora(file, layer_names()), None
    except UserError as error:
        return None, str(error).removeprefix(f"{file}: ")


def _refusal(problem: str) -> dict[str, Any]:
    return {"loads": REFUSED, "notes": [{"effect": REFUSED, "why": problem, "keys": []}]}


def _kind(keys: Keys) -> str:
    kinds = keys.kinds
    return ", ".join(kinds) if len(kinds) == 1 else ", ".join(f"{kind} x {count}" for kind, count in kinds.items())


def _family(keys: Keys, header: Header, lora: LoRAFile | None) -> str:
    if lora is not None:
        fit = fitting({name: layer.flat_shape for name, layer in lora.layers.items()})
        if fit:
            return " or ".join(fit)
    downs = {name: header.tensors[held[DOWN]].shape for name, held in keys.layers.items() if DOWN in held}
    widths = {shape[1] for name, shape in downs.items() if re.search(r"attn2[._]to_k$", name) and len(shape) > 1}
    width = widths.pop() if len(widths) == 1 else None
    title = WIDTHS.get(width, f"not known: its text width is {width}") if width else "not known"
    return f"{title}, by its text width alone" if width in WIDTHS else title


def _targets(names: Iterable[str]) -> list[str]:
    """The kinds of layer, without their places."""
    inside = r"^.*?(?=attn\d[._]|self_attn[._]|ff[._]|mlp[._])"
    return sorted({re.sub(inside if re.match(inside, name) else r"^.*\.\d+\.", "", name) for name in names})


def _numbers(file: Path, header: Header, lora: LoRAFile | None) -> dict[str, Any]:
    """Norms by block, and what is not finite."""
    from loratune.formats.files import read_tensors
    from loratune.lora.compare import not_finite, sizes_by_block
    from loratune.lora.progress import shown

    if lora is None:
        floats = [key for key, info in header.tensors.items() if info.dtype in ("F16", "BF16", "F32", "F64")]
        return {"not finite": not_finite(read_tensors(file, floats).items())}
    sizes = sizes_by_block(shown(list(lora.layers.items()), "norms"))
    return {
        "not finite": {},
        "norm of (alpha/r) B A": {block: found["frobenius"] for block, found in sizes.items()},
        "spectral norm": {block: found["spectral"] for block, found in sizes.items()},
        "effective rank": {block: found["effective_rank"] for block, found in sizes.items()},
    }


def _training(metadata: dict[str, str]) -> dict[str, str]:
    facts = {}
    for label, names in TRAINING.items():
        stated = [metadata[name] for name in names if metadata.get(name, "None") not in ("None", "")]
        if stated:
            facts[label] = " / ".join(stated)
    if tags := _tags(metadata.get("ss_tag_frequency", "")):
        facts["most frequent tags"] = ", ".join(tags)
    return facts


def _tags(text: str) -> list[str]:
    """The ten most frequent tags of sd-scripts' ss_tag_frequency: {folder: {tag: count}}."""
    parsed = _parsed(text)
    counts: dict[str, int] = {}
    for tags in parsed.values() if isinstance(parsed, dict) else []:
        for tag, count in tags.items() if isinstance(tags, dict) else []:
            counts[tag] = counts.get(tag, 0) + (count if isinstance(count, int) else 0)
    return sorted(counts, key=lambda tag: -counts[tag])[:10]


def _parsed(text: str) -> Any:
    try:
        return jsons.loads(text)
    except (ValueError, RecursionError):
        return text


def compare(one: Path, other: Path) -> dict[str, Any]:
    """How two LoRA files differ.

    Raises:
        UserError: one cannot be read, or is no LoRA.
    """
    from loratune.lora.compare import difference
    from loratune.lora.file import read_lora
    from loratune.lora.progress import shown

    for path in (one, other):
        if path.is_dir() or not detect_format(read_header(path).tensors):
            raise UserError(f"{path}: is no LoRA; --diff compares two LoRAs, `extract` two checkpoints")
    left, right = (read_lora(path, layer_names()).layers for path in (one, other))
    names = shown(sorted({*left, *right}), "comparing")
    return {"A": str(one), "B": str(other), **difference(left, right, names)}
