"""What is to be known of a recipe's images before they are trained on: counts, and each fault by name."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loratune.data.buckets import Size
from loratune.data.collection import Collection
from loratune.data.duplicates import Fingerprint, fingerprint, near
from loratune.data.entries import Entry
from loratune.data.folder import NO_IMAGE, UNREAD_KIND
from loratune.data.order import BatchOrder, groups, often
from loratune.data.samples import Sample
from loratune.errors import UserError
from loratune.formats.images import open_image

TOO_SMALL = 2.0
"""Images that are enlarged more than so many times are called too small."""
TAGS = 20
ENDINGS = {"JPEG": {".jpg", ".jpeg", ".jfif"}, "TIFF": {".tif", ".tiff"}, "MPO": {".jpg", ".jpeg"}}


@dataclass(frozen=True)
class Finding:
    """One kind of fault and where it is.

    Args:
        kind: its name in the JSON.
        message: what it is, for a person.
        mend: what to do.
        names: of the images or files, some with what is wrong with them.
        serious: whether `data.strict` stops a run for it.
    """

    kind: str
    message: str
    mend: str
    names: tuple[str, ...]
    serious: bool = False


@dataclass(frozen=True)
class SourceCount:
    """A source in numbers.

    Args:
        path: of it.
        role: as the recipe says.
        images: that can be read.
        held_out: of these.
        drawn: how many of its images come in an epoch.
    """

    path: str
    role: str
    images: int
    held_out: int
    drawn: int


@dataclass(frozen=True)
class Audit:
    """The report on a recipe's images.

    Args:
        sources: in numbers.
        buckets: how many images that are trained on each width and height has.
        batches: in an epoch.
        tags: the most frequent, and in how many captions each is.
        findings: faults, the serious ones first.
    """

    sources: tuple[SourceCount, ...]
    buckets: dict[Size, int]
    batches: int
    tags: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def serious(self) -> list[Finding]:
        """What stops a strict run."""
        return [finding for finding in self.findings if finding.serious]


@dataclass
class Seen:
    """One image as it was looked at.

    Args:
        name: of its file.
        entry: none where it could not be read.
        print: likewise.
        fault: what is wrong where it could not.
        mask: what is wrong with its mask.
        ending: what its name should end with, where it ends with something else.
        bare: whether it has no caption.
        masked: whether it has a mask.
    """

    name: str
    entry: Entry | None = None
    print: Fingerprint | None = None
    fault: str = ""
    mask: str = ""
    ending: str = ""
    bare: bool = False
    masked: bool = False


class Looked(Dataset[Seen]):
    """Every image of a collection, decoded once.

    Args:
        collection: the images.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection

    def __len__(self) -> int:
        return len(self.collection)

    def __getitem__(self, number: int) -> Seen:
        source, row = self.collection.at(number)
        sample = self.collection.sources[source][row]
        seen = Seen(sample.name, ending=wrong_ending(sample), bare=not sample.captions)
        try:
            seen.entry = self.collection.entry(source, row, sample)
            seen.masked = bool(seen.entry.mask)
        except UserError as error:  # of its mask
            seen.mask = str(error)
            return seen
        except OSError as error:
            seen.fault = str(error)
            return seen
        try:
            seen.print = fingerprint(open_image(sample.data))
        except OSError as error:
            seen.entry, seen.fault = None, str(error)
        return seen


def wrong_ending(sample: Sample) -> str:
    """What an image's content is, where its file's name ends with something else; empty where it does not."""
    ending = Path(sample.name).suffix.lower() if sample.root else ""
    if not ending:
        return ""
    try:
        with Image.open(io.BytesIO(sample.data)) as opened:
            kind = opened.format or ""
    except Exception:  # unreadable images are reported elsewhere
        return ""
    return "" if ending in ENDINGS.get(kind, {f".{kind.lower()}"}) else kind


def enlarged(entry: Entry) -> float:
    """How many times an image is enlarged to cover its bucket."""
    return max(entry.bucket[0] / entry.size[0], entry.bucket[1] / entry.size[1])


def audit(
    collection: Collection,
    batch_size: int,
    count_tokens: Callable[[str], int],
    room: int,
    workers: int = 0,
    progress: Callable[[Any], Iterable[Seen]] = iter,
) -> Audit:
    """Look at every image of a recipe; nothing is written.

    Args:
        collection: the images.
        batch_size: of all processes together.
        count_tokens: of a caption.
        room: tokens that a prompt holds.
        workers: processes that decode.
        progress: shows how far it is.
    """
    looks = DataLoader(Looked(collection), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    seen = list(progress(looks))
    readable = [(one, one.entry) for one in seen if one.entry is not None]
    out = [collection.is_held_out(entry) for _, entry in readable]
    trained = [entry for (_, entry), is_out in zip(readable, out, strict=True) if not is_out]
    each = often(collection.settings, [sum(e.source == s for e in trained) for s in range(len(collection.settings))])
    order = BatchOrder(groups(trained, each), [entry.bucket for entry in trained], batch_size, 0)
    counts = _counts(collection, readable, out, trained, order)
    findings = [
        *_faults(collection, seen),
        *_captions([entry for _, entry in readable], count_tokens, room),
        *_doubles(readable, out),
        *_sizes(readable, out, trained, order, each),
    ]
    kept = tuple(sorted((one for one in findings if one.names), key=lambda one: not one.serious))
    batches = len(order)
    tags = _tags([entry for _, entry in readable], collection.captions.separator)
    return Audit(counts, dict(Counter(entry.bucket for entry in trained)), batches, tags, kept)


def _as_it_is(value: Any) -> Any:
    return value


def _counts(
    collection: Collection, readable: Sequence[tuple[Seen, Entry]], out: Sequence[bool], trained: Any, order: BatchOrder
) -> tuple[SourceCount, ...]:
    drawn = Counter(trained[draw.sample].source for batch in order for draw in batch)
    counts = []
    for number, source in enumerate(collection.settings):
        own = [is_out for (_, entry), is_out in zip(readable, out, strict=True) if entry.source == number]
        counts.append(SourceCount(source.path, source.role, len(own), sum(own), drawn[number]))
    return tuple(counts)


def _faults(collection: Collection, seen: Sequence[Seen]) -> list[Finding]:
    broken = tuple(f"{image.name} ({image.fault})" for image in seen if image.fault)
    endings = tuple(f"{image.name} (is {image.ending})" for image in seen if image.ending)
    bare = tuple(image.name for image in seen if image.bare)
    wrong = tuple(image.mask for image in seen if image.mask)
    without = tuple(
        image.name
        for image in seen
        if image.entry is not None and collection.masks[image.entry.source] is not None and not image.masked
    )
    skipped = {name: reason for source in collection.sources for name, reason in source.skipped.items()}
    texts = tuple(name for name, reason in skipped.items() if reason == NO_IMAGE)
    kinds = tuple(name for name, reason in skipped.items() if reason == UNREAD_KIND)
    others = tuple(f"{name} ({reason})" for name, reason in skipped.items() if reason not in (NO_IMAGE, UNREAD_KIND))
    return [
        Finding("unreadable", "unreadable images", "mend or remove them", broken, True),
        Finding("no_caption", "images without a caption", "write it into a .txt file beside each", bare, True),
        Finding("mask_wrong", "masks that do not fit", "make each as large as its image", wrong, True),
        Finding("no_mask", "images without a mask, whose whole loss counts", "draw one, if that is not meant", without),
        Finding("ending", "file extensions that do not match the content", "rename them", endings),
        Finding("no_image", "caption files without an image", "rename or remove them", texts),
        Finding("unread_kind", "images in formats that are not read", "save them as PNG", kinds),
        Finding("left_out", "files that are not used", "mend them, or move them elsewhere", others),
    ]


def _captions(entries: Sequence[Entry], count_tokens: Callable[[str], int], room: int) -> list[Finding]:
    cut = []
    for entry in entries:
        # A token has at least one byte, so short captions need not be counted.
        over = max(count_tokens(caption) - room if len(caption.encode()) > room else 0 for caption in entry.captions)
        if over > 0:
            cut.append(f"{entry.name} ({over} of its tokens)")
    message = f"captions truncated at {room} tokens"
    return [Finding("cut", message, "shorten them, or set model.prompts.chunks higher", tuple(cut), True)]


def _doubles(readable: Sequence[tuple[Seen, Entry]], out: Sequence[bool]) -> list[Finding]:
    first: dict[str, int] = {}
    exact = []
    for number, (_, entry) in enumerate(readable):
        exact.append((first.setdefault(entry.digest, number), number))
    exact = [(one, other) for one, other in exact if one != other]
    same = set(exact)
    prints = [seen.print for seen, _ in readable if seen.print is not None]
    alike = [pair for pair in near(prints) if readable[pair[0]][1].digest != readable[pair[1]][1].digest]

    def names(pairs: Iterable[tuple[int, int]], leaks: bool) -> tuple[str, ...]:
        chosen = [(a, b) for a, b in pairs if (out[a] != out[b]) == leaks]
        return tuple(f"{readable[a][0].name} and {readable[b][0].name}" for a, b in chosen)

    keep = "remove them, or set data.split_by: image"
    return [
        Finding(
            "leak",
            "images in both training and validation (train/validation leakage)",
            keep,
            names(sorted(same), True),
            True,
        ),
        Finding(
            "near_leak",
            "validation images nearly identical to training images",
            "remove one of each",
            names(alike, True),
        ),
        Finding("duplicate", "duplicate images", "remove one of each", names(sorted(same), False)),
        Finding("near_duplicate", "near-duplicate images", "keep the better one", names(alike, False)),
    ]


def _sizes(
    readable: Sequence[tuple[Seen, Entry]],
    out: Sequence[bool],
    trained: Sequence[Entry],
    order: BatchOrder,
    each: Sequence[float],
) -> list[Finding]:
    times = [(seen.name, enlarged(entry)) for seen, entry in readable]
    upscaled = tuple(f"{name} ({by:.2f} times)" for name, by in times if 1 < by <= TOO_SMALL)
    small = tuple(f"{name} ({by:.2f} times)" for name, by in times if by > TOO_SMALL)
    names = [seen.name for (seen, _), is_out in zip(readable, out, strict=True) if not is_out]
    message = f"images upscaled more than {TOO_SMALL:g} times to fill their bucket"
    return [
        Finding("lost", "images that are never sampled", "report this as a fault", _lost(names, order, each)),
        Finding("too_small", message, "give larger ones, or set data.buckets.upscale: false", small),
        Finding("upscaled", "images upscaled to fill their bucket", "give larger ones if they look soft", upscaled),
    ]


def _lost(names: Sequence[str], order: BatchOrder, each: Sequence[float]) -> tuple[str, ...]:
    """Which images are never drawn; of sources that come less than once an epoch, in as many as it takes."""
    fewest = min((times for times in each if times > 0), default=1.0)
    drawn: set[int] = set()
    for epoch in range(min(1000, 1 + round(1 / fewest)) if fewest < 1 else 1):
        order.epoch = epoch
        drawn |= {draw.sample for batch in order for draw in batch}
        if len(drawn) == len(names):
            break
    return tuple(name for number, name in enumerate(names) if number not in drawn)


def _tags(entries: Sequence[Entry], separator: str) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for entry in entries:
        text = entry.caption.removeprefix(entry.prefix)
        counted.update({tag.strip() for tag in text.split(separator) if tag.strip()})
    return dict(counted.most_common(TAGS))
