"""LoRAs added to a checkpoint, or taken out again.

numpy is loaded while the copy is under way; torch is not at all, but for 8-bit numbers.
"""

from __future__ import annotations

import json as jsons
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base import Base
from loratune.families.slots import Slot
from loratune.families.weight_files import index_name, index_of
from loratune.formats.atomic import atomic_folder, atomic_path
from loratune.formats.headers import PICKLE_SUFFIXES, read_header
from loratune.formats.streaming import Output, Range, Writer, check_space, joined, opened, opened_copy, without
from loratune.lora.keys import describe_keys
from loratune.lora.merge.report import Bar, report_of
from loratune.lora.merge.request import Request, check_blocks

if TYPE_CHECKING:
    from loratune.lora.merge.arithmetic import Tally
    from loratune.lora.merge.match import Matches, Weighted

MERGES_KEY = "loratune.merged"
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
TEXTS = (".json", ".txt")
SMALL = 1 << 20  # bytes; what is less is copied at once


def merge(asked: Request) -> dict[str, Any]:
    """Write a base with LoRAs added (or subtracted); returns what that did.

    Raises:
        UserError: nothing to add, the LoRAs do not fit, or the place cannot be written to; nothing is left there.
    """
    if not asked.given:
        raise UserError("merge: nothing to add; give --lora FILE or --lora FILE:SCALE")
    _check_out(asked)
    for one in asked.given:
        check_blocks(one, module_names(asked.base.configs))
    converting = asked.base.single != (asked.out.suffix == ".safetensors")
    return _converted(asked) if converting else _streamed(asked)


def _check_out(asked: Request) -> None:
    out, path = asked.out, asked.base.path
    if out.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"--out {out}: pickles are not written; give a name that ends in .safetensors, or a folder's")
    for one in asked.given:
        if _same(out, one.path):
            raise UserError(f"--out {out}: is a LoRA that is merged; give another name")
    if _same(out, path) and not asked.in_place:
        raise UserError(f"--out {out}: is the base itself; give another name, or --in-place to replace it")
    if path.is_dir() and path.resolve() in out.resolve().parents:
        raise UserError(f"--out {out}: lies inside the base; give another place")
    if out.suffix == ".safetensors" and out.is_dir():
        raise UserError(f"--out {out}: is a folder; give another name")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder, however they are spelled or linked."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and os.path.samefile(one, other))


def noted(metadata: Mapping[str, str], note: Mapping[str, Any]) -> dict[str, str]:
    """A file's metadata with one merge more in its list of them."""
    try:
        before = jsons.loads(metadata.get(MERGES_KEY, "[]"))
    except (ValueError, RecursionError):
        before = metadata[MERGES_KEY]
    merges = before if isinstance(before, list) else [before]
    return {**metadata, MERGES_KEY: jsons.dumps([*merges, note])}


class _OtherParts(Exception):  # noqa: N818 (it is no error)
    """Other components are changed than the LoRAs' keys said: layers of zeros among them, or weights of 0."""

    def __init__(self, parts: set[str]) -> None:
        self.parts = parts


def _streamed(asked: Request) -> dict[str, Any]:
    """Merge into what the base is: a file into a file, a folder into a folder."""
    base, names = asked.base, module_names(asked.base.configs)
    layers = {name for one in asked.given for name in describe_keys(read_header(one.path), names).layers}
    guessed = layers & base.layers.keys()
    try:
        return _attempt(asked, guessed, _parts_of(base, guessed))
    except _OtherParts as other:
        return _attempt(asked, guessed, other.parts)


def _parts_of(base: Base, layers: Iterable[str]) -> set[str]:
    """The components whose files hold these layers; a single file holds them all."""
    return {base.parts[0]} if base.single else {name.partition(".")[0] for name in layers}


def _attempt(asked: Request, guessed: set[str], parts: set[str]) -> dict[str, Any]:
    """Merge, with notes in the files of some components; the others' files stay as they are, byte for byte.

    Raises:
        _OtherParts: those are not the components that change.
    """
    base = asked.base
    bar = Bar()
    with ExitStack() as stack:
        target = _place(asked, stack)
        outputs = _open(asked, target, parts, stack)
        headers = {file: header for part in parts for file, header in base.files(part).items()}
        changing = {file: output for file, output in outputs.items() if file in headers}
        withheld = {file: _ranges(base.layers, guessed, file) for file in changing}
        _check_room(asked, outputs, withheld)
        writer = stack.enter_context(Writer(bar.advance))
        for file, output in outputs.items():
            writer.copy(output, without([(0, output.length)], withheld.get(file, [])))
        bar.show(sum(output.length for output in outputs.values()), stack)

        _load_numpy()  # only now, as it takes a while
        from loratune.lora.merge.stream import apply, patches

        loras, matches = _matched(asked, {name: slot.shape for name, slot in base.layers.items()})
        if (actual := _parts_of(base, matches.terms)) != parts:
            raise _OtherParts(actual)
        patched = patches(base.layers, matches.terms)
        tallies = apply(patched, changing, writer, withheld, asked.exact, asked.unmerge)
    tensors = len({(patch.slot.file, patch.slot.key) for patch in patched})
    return report_of(asked, loras, matches, tallies, tensors)


def _place(asked: Request, stack: ExitStack) -> Path:
    """The temporary file or folder that becomes the output."""
    replace = asked.in_place and _same(asked.out, asked.base.path)
    out = asked.out.resolve() if replace else asked.out  # the base itself, not a link to it
    return stack.enter_context(atomic_path(out) if asked.base.single else atomic_folder(out, replace))


def _open(asked: Request, target: Path, parts: Iterable[str], stack: ExitStack) -> dict[Path, Output]:
    """The outputs by source file, with their headers; a folder's small files are copied."""
    base = asked.base
    headers = {file: header for part in parts for file, header in base.files(part).items()}
    if base.single:
        metadata = noted(headers[base.path].metadata, asked.note)
        return {base.path: stack.enter_context(opened(base.path, headers[base.path], target, metadata))}
    outputs: dict[Path, Output] = {}
    for file in _kept(base, parts):
        place = target / file.relative_to(base.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file in headers:
            metadata = noted(headers[file].metadata, asked.note)
            outputs[file] = stack.enter_context(opened(file, headers[file], place, metadata))
        elif file.stat().st_size < SMALL:
            shutil.copyfile(file, place)
        else:
            outputs[file] = stack.enter_context(opened_copy(file, place))
    _index_shards(base, target)
    return outputs


def _kept(base: Base, parts: Iterable[str]) -> list[Path]:
    """A folder's files, without other copies (half precision, pickles) of the weights of components that change.

    They would stay unmerged beside the merged ones.
    """
    changing = {base.path / part for part in parts}
    needed = {base.path / part / name for part in parts for name in (base.index(part), *base.files(part)) if name}
    files = sorted(file for file in base.path.rglob("*") if file.is_file())
    return [file for file in files if file.parent not in changing or file in needed or _is_text(file)]


def _is_text(file: Path) -> bool:
    """Whether a file of a component is a configuration or the like, and no list of shards."""
    return file.suffix in TEXTS and ".index." not in file.name


def _index_shards(base: Base, target: Path) -> None:
    """Write the list of a component's shards, without which diffusers does not read them, where there is none."""
    for part in base.variants:
        headers = base.files(part)
        if len(headers) > 1 and base.index(part) is None:
            size = sum(header.size - header.data_offset for header in headers.values())
            text = index_of({file.name: header.tensors for file, header in headers.items()}, size)
            (target / part / index_name(next(iter(headers)).name)).write_text(text, encoding="utf-8")


def _ranges(slots: Mapping[str, Slot], names: Iterable[str], file: Path) -> list[Range]:
    return joined((slots[name].start, slots[name].stop) for name in names if slots[name].file == file)


def _check_room(asked: Request, outputs: Mapping[Path, Output], withheld: Mapping[Path, Sequence[Range]]) -> None:
    needed = 0
    for file, output in outputs.items():
        changed = sum(stop - start for start, stop in withheld.get(file, []))
        needed += changed if output.shared else output.begins[1] + output.length
    check_space(asked.out.resolve().parent, needed, asked.out)


def _load_numpy() -> None:
    """Load numpy with one thread for each product: the layers are what runs in parallel."""
    if "numpy" in sys.modules:
        return
    before = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        if before is None:
            del os.environ[BLAS_THREADS]
        else:
            os.environ[BLAS_THREADS] = before


def _matched(asked: Request, shapes: Mapping[str, Sequence[int]]) -> tuple[list[Weighted], Matches]:
    """The LoRAs, read, and their layers in the base."""
    from loratune.lora.file import read_layers
    from loratune.lora.merge.match import Weighted, terms_by_layer

    names = module_names(asked.base.configs)
    loras = [Weighted(one, read_layers(one.path, names, partial=asked.allow_partial)) for one in asked.given]
    for one in loras if asked.unmerge else []:
        if dora := [name for name, layer in one.file.layers.items() if layer.magnitude is not None]:
            reason = "is a DoRA, whose change depends on the W_0 that is wanted back"
            raise UserError(f"{one.path}: {dora[0]} {reason}; it cannot be unmerged")
    return loras, terms_by_layer(loras, shapes, asked.allow_partial, -1 if asked.unmerge else 1)


def _converted(asked: Request) -> dict[str, Any]:
    """Merge a folder into a single file, or the other way; all weights are in memory."""
    import torch

    from loratune.families.save import write_settings, write_single_file
    from loratune.formats.files import dtype_name, write_safetensors
    from loratune.lora.merge.arithmetic import checked

    asked.base.require_whole("writing it in the other layout")
    path, configs, weights = asked.base.path, asked.base.configs, asked.base.weights()
    flat = {
        f"{part}.{key.removesuffix('.weight')}": (part, key)
        for part in weights
        if asked.base.family.part(part).adaptable
        for key in weights[part]
        if key.endswith(".weight")
    }
    loras, matches = _matched(asked, {name: weights[part][key].shape for name, (part, key) in flat.items()})
    tallies: dict[str, Tally] = {}
    for name, terms in matches.terms.items():
        if some := [(weight, layer) for weight, layer in terms if weight]:
            part, key = flat[name]
            where, new = f"{path}: {part} {key!r}", weights[part][key].clone().contiguous()
            raw = new.reshape(-1).view(torch.uint8).numpy()
            tallies[name] = checked(raw, dtype_name(new.dtype), new.shape, some, where, asked.exact, asked.unmerge)
            weights[part][key] = new
    headers = [header for part in asked.base.parts for header in asked.base.files(part).values()]
    merges = {key: header.metadata[key] for header in headers for key in (MERGES_KEY,) if key in header.metadata}
    note = {MERGES_KEY: noted(merges, asked.note)[MERGES_KEY]}
    size = sum(value.numel() * value.element_size() for some in weights.values() for value in some.values())
    folder = asked.out.resolve().parent
    check_space(next(one for one in (folder, *folder.parents) if one.exists()), size, asked.out)
    if asked.out.suffix == ".safetensors":
        write_single_file(asked.out, configs, weights, note)
    else:
        with atomic_folder(asked.out) as temporary:
            for part in weights:
                changed = any(name.startswith(f"{part}.") for name in matches.terms)
                metadata = {"format": "pt", **(note if changed else {})}
                (temporary / part).mkdir()
                write_safetensors(temporary / part / asked.base.family.part(part).file, weights[part], metadata)
            write_settings(temporary, configs)
    return report_of(asked, loras, matches, tallies, len(tallies))
