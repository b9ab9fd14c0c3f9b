"""The verbs that work on files: sample, merge, inspect."""

from __future__ import annotations

import json as jsons
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from loratune.adapters.merge import Weighted, added, merge_into, parse_weighted, patches, terms_by_layer
from loratune.errors import UserError
from loratune.families.files import layer_names, load_family, pipeline_of, read_folder, read_single_file, write_folder
from loratune.families.sampling import draw, make_sampler
from loratune.families.stable_diffusion import StableDiffusion
from loratune.formats.architectures import architectures, describe_unsupported, detect, single_file_table
from loratune.formats.bases import CONFIGS_KEY, WEIGHTS, Configs, configs_of_file, find_base
from loratune.formats.checkpoints import to_single_file
from loratune.formats.files import atomic_folder, rewrite, write_safetensors
from loratune.formats.headers import Header, read_header
from loratune.formats.lora import detect_format, read_lora
from loratune.formats.pictures import to_picture
from loratune.report.grids import grid

MERGES_KEY = "loratune.merged"
TEXTS = (".json", ".txt")


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here; give cpu or auto") from None


def load_with(base: str, lora: Sequence[str], device: str = "auto") -> StableDiffusion:
    """A base with LoRAs added to its weights, ready to draw."""
    family = load_family(base)
    names = layer_names(configs_of_file(find_base(base)))
    merge_into(family.components(), [parse_weighted(text, names) for text in lora])
    return family.requires_grad_(False).eval().to(pick_device(device))


def own_size(family: StableDiffusion) -> int:
    """The side of the pictures a base was made for, in pixels."""
    return int(family.network.config["sample_size"] * 2 ** (len(family.vae.config["block_out_channels"]) - 1))


def sample(
    base: str,
    lora: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    steps: int,
    guidance: float,
    sampler: str,
    seed: int,
    count: int,
    size: int | None,
    batch_size: int,
    device: str,
) -> None:
    """Draw `count` pictures of each prompt into `out`: PNG files and grid.png."""
    for key, value in (("steps", steps), ("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{key} is {value}; give 1 or more")
    family = load_with(base, lora, device)
    make_sampler(sampler, family.scheduler_config)
    wanted = [(prompt, seed + number) for prompt in prompts for number in range(count)]
    side = size or own_size(family)
    drawn: list[Tensor] = []
    parts = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for part in track(parts, description="drawing", transient=True):
        texts, seeds = [prompt for prompt, _ in part], [one for _, one in part]
        drawn.extend(draw(family, texts, seeds, side, steps, guidance, sampler).cpu())
    out.mkdir(parents=True, exist_ok=True)
    pictures = [to_picture(pixels) for pixels in drawn]
    for number, (picture, (prompt, one)) in enumerate(zip(pictures, wanted, strict=True)):
        picture.save(out / f"{number:03d}-{slug(prompt)}-{one}.png")
    rows = [[pictures[i * count + n] for i in range(len(prompts))] for n in range(count)]
    grid(rows, prompts, [f"seed {seed + n}" for n in range(count)], cell=max(128, side)).save(out / "grid.png")
    print(f"{len(pictures)} pictures and grid.png are in {out}")


def slug(text: str) -> str:
    """Words of a text, safe as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"


def merge(base: str, lora: Sequence[str], out: Path) -> None:
    """Write a base with LoRAs added; U-Net, text encoder and VAE in a single file, or a diffusers folder."""
    path = find_base(base)
    if not lora:
        raise UserError("merge: nothing to add; give --lora FILE or --lora FILE:WEIGHT")
    if out.resolve() == path.resolve():
        raise UserError(f"--out {out}: is the base itself; give another name")
    configs = configs_of_file(path)
    loras = [parse_weighted(text, layer_names(configs)) for text in lora]
    single = out.suffix == ".safetensors"
    note = jsons.dumps({"base": base, "loras": [[str(one.path), one.weight] for one in loras]})
    if path.is_dir() and not single:
        _merge_folder(path, configs, loras, out, note)
    elif path.is_file() and single:
        _merge_file(path, configs, loras, out, note)
    elif not pipeline_of(configs).original_layout:
        raise UserError(f"--out {out}: this base is merged into a folder; give a name without .safetensors")
    else:
        _merge_converting(path, loras, out, note)
    changed = len({name for one in loras for name in one.file.layers})
    print(f"{out}: {changed} layers changed by {len(loras)} LoRA{'s' if len(loras) > 1 else ''}")


def _merge_file(path: Path, configs: Configs, loras: Sequence[Weighted], out: Path, note: str) -> None:
    header = read_header(path)
    table = single_file_table(configs["unet"], configs["vae"], configs["text_encoder"])
    keys = {f"{part}.{key.removesuffix('.weight')}": full for (part, key), full in table.items()}
    shapes = {key: info.shape for key, info in header.tensors.items()}
    rewrite(path, out, patches(loras, keys, shapes), {**header.metadata, MERGES_KEY: note})


def _merge_folder(path: Path, configs: Configs, loras: Sequence[Weighted], out: Path, note: str) -> None:
    components = [part for part in pipeline_of(configs).parts if part != "vae"]
    headers = {part: read_header(path / part / WEIGHTS[part]) for part in components}
    names = {part: _folder_keys(part, headers[part]) for part in components}
    shapes = {name: headers[part].tensors[key].shape for part in components for name, key in names[part].items()}
    terms_by_layer(loras, shapes)  # told before anything is written
    with atomic_folder(out) as temporary:
        # Other copies of the weights (half precision, pickles) would stay unmerged beside the merged ones.
        skipped = {file for part in components for file in (path / part).iterdir() if file.suffix not in TEXTS}
        for file in sorted(path.rglob("*")):
            if file.is_file() and file not in skipped:
                (temporary / file.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / file.relative_to(path))
        for part in components:
            own = [_only(one, part) for one in loras]
            made = patches(own, names[part], {key: info.shape for key, info in headers[part].tensors.items()})
            target = temporary / part / WEIGHTS[part]
            target.parent.mkdir(parents=True, exist_ok=True)
            source, metadata = path / part / WEIGHTS[part], headers[part].metadata
            rewrite(source, target, made, {**metadata, MERGES_KEY: note} if made else metadata)


def _folder_keys(part: str, header: Header) -> dict[str, str]:
    from loratune.adapters.lora import canonical

    keys = [key for key in header.tensors if key.endswith(".weight")]
    return {f"{part}.{canonical(part, key.removesuffix('.weight'))}": key for key in keys}


def _only(lora: Weighted, component: str) -> Weighted:
    layers = {name: layer for name, layer in lora.file.layers.items() if name.startswith(f"{component}.")}
    return Weighted(lora.path, lora.weight, type(lora.file)(layers, lora.file.metadata))


def _merge_converting(path: Path, loras: Sequence[Weighted], out: Path, note: str) -> None:
    configs, weights = read_folder(path) if path.is_dir() else read_single_file(path)
    flat = {
        f"{part}.{key.removesuffix('.weight')}": (part, key)
        for part in ("unet", "text_encoder")
        for key in weights[part]
        if key.endswith(".weight")
    }
    shapes = {name: weights[part][key].shape for name, (part, key) in flat.items()}
    for name, terms in terms_by_layer(loras, shapes).items():
        part, key = flat[name]
        weights[part][key] = added(weights[part][key], terms)
    if out.suffix == ".safetensors":
        metadata = {"format": "pt", CONFIGS_KEY: jsons.dumps(configs), MERGES_KEY: note}
        write_safetensors(out, to_single_file(weights, configs), metadata)
    else:
        write_folder(out, configs, weights)


def inspect(file: Path, json: bool) -> None:
    """Print what a file is, as a table or as JSON."""
    header = read_header(file)
    found = describe_lora(file, header) if detect_format(header.tensors) else describe_checkpoint(file, header)
    if json:
        print(jsons.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}: {_short(one)}" for name, one in value.items())
        table.add_row(f"[bold]{key}[/bold]", _short(value))
    Console().print(table)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_lora(file: Path, header: Header) -> dict[str, Any]:
    """Format, rank, alpha, targets, size, norms by block, and what it carries about how it was made."""
    lora = read_lora(file)
    shapes = {name: (layer.up.shape[0], *layer.down.shape[1:]) for name, layer in lora.layers.items()}
    norms: dict[str, float] = {}
    for name, layer in lora.layers.items():
        block = ".".join(name.split(".")[: 3 if "_blocks" in name.split(".")[1] else 2])
        norms[block] = (norms.get(block, 0.0) ** 2 + float(layer.matrix().square().sum())) ** 0.5
    ours = {key.removeprefix("loratune."): value for key, value in lora.metadata.items() if key.startswith("loratune.")}
    return {
        "file": str(file),
        "kind": f"LoRA ({detect_format(header.tensors)} keys)",
        "family": _family_of(shapes),
        "rank": sorted({layer.rank for layer in lora.layers.values()}),
        "alpha": sorted({layer.alpha for layer in lora.layers.values()}),
        "layers": len(lora.layers),
        "targets": sorted({re.sub(r"^.*?(attn\d\.|self_attn\.|ff\.|mlp\.)", r"\1", name) for name in lora.layers}),
        "size": f"{header.size:,} bytes, {_dtypes(header)}",
        "norm of (alpha/r) B A": norms,
        **ours,
    }


def _family_of(shapes: dict[str, tuple[int, ...]]) -> str:
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k")}
    known = {config["unet"]["cross_attention_dim"]: name for name, config in architectures().items()}
    if len(widths) != 1:
        return "Stable Diffusion, text width not known from its layers"
    width = widths.pop()
    return str(known.get(width, f"Stable Diffusion 1.x layout, text width {width}"))


def describe_checkpoint(file: Path, header: Header) -> dict[str, Any]:
    """Family, size, dtypes and merges of a checkpoint, from its header alone."""
    carried = "a Stable Diffusion 1.x layout with its own configuration" if CONFIGS_KEY in header.metadata else None
    kind = detect(header) or carried or describe_unsupported(header) or "not a file that is known here"
    found = {"file": str(file), "kind": kind, "tensors": len(header.tensors)}
    found["size"] = f"{header.size:,} bytes, {_dtypes(header)}"
    return found | {key: value for key, value in header.metadata.items() if key != CONFIGS_KEY}


def _dtypes(header: Header) -> str:
    counts: dict[str, int] = {}
    for info in header.tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + 1
    return ", ".join(f"{dtype} x {count}" for dtype, count in counts.items())
