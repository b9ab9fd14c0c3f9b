"""Captioned pictures -> cached latents and text embeddings -> batches."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from loratune.data.encode import Encoder, Entry
from loratune.data.sources import Source, read_source
from loratune.errors import UserError
from loratune.formats.pictures import open_picture, square, to_tensor

log = logging.getLogger(__name__)
NAMED = 10


class CaptionedImages(L.LightningDataModule):
    """Captioned pictures as training batches; what a frozen VAE and text encoder make is cached on disk.

    Args:
        path: a folder with .txt captions, metadata.jsonl or metadata.csv; a .parquet file; a hub dataset.
        size: side of the square that pictures are brought to, in pixels.
        batch_size: pictures in a batch.
        prefix: put before every caption (a trigger word).
        validation_percent: share of the pictures held out for the validation loss, 0 to 50.
        split_by: what the split hashes: the picture's bytes, or its caption.
        image_column: the column of pictures, for parquet and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt.
        allow_missing_captions: train on pictures without a caption, as pictures of nothing in particular.
        strict: stop at the first unreadable picture instead of going on without it.
        cache: folder of encoded pictures and captions, shared between runs.
        workers: processes that load batches.
    """

    def __init__(
        self,
        path: str,
        size: int = 512,
        batch_size: int = 1,
        prefix: str = "",
        validation_percent: int = 5,
        split_by: Literal["picture", "caption"] = "picture",
        image_column: str = "image",
        caption_column: str | None = None,
        allow_missing_captions: bool = False,
        strict: bool = False,
        cache: Path = Path("~/.cache/loratune"),
        workers: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least, most in (
            ("size", size, 8, 8192),
            ("batch_size", batch_size, 1, 65536),
            ("validation_percent", validation_percent, 0, 50),
        ):
            if not least <= value <= most:
                raise ValueError(f"data.{key} is {value}; give {least} to {most}")
        self.path, self.size, self.batch_size, self.prefix = path, size, batch_size, prefix
        self.validation_percent, self.split_by = validation_percent, split_by
        self.image_column, self.caption_column = image_column, caption_column
        self.allow_missing_captions, self.strict = allow_missing_captions, strict
        self.cache, self.workers = cache, workers
        self.unreadable: list[str] = []
        self.training: Dataset[Any] | None = None
        self.held_out: Dataset[Any] | None = None

    def setup(self, stage: str) -> None:
        """Read the source, say what is wrong with it, and encode what is not in the cache yet."""
        if self.training is not None:
            return
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        source = read_source(self.path, self.image_column, self.caption_column)
        self._check_captions(source)
        encoder = None
        if module.batch_kind == "latents":
            module.family.start_shape(self.size)  # refuses a size that the VAE cannot halve often enough
            encoder = Encoder(module.family, self.cache, self.size, text=module.text_is_frozen)
            encoder.family.to(self.trainer.strategy.root_device)
        training: list[Entry] = []
        held_out: list[Entry] = []
        for entry in self._entries(source, encoder):
            (held_out if self._is_held_out(entry) else training).append(entry)
        self._report_unreadable(len(source))
        if not training:
            raise UserError(f"{self.path}: no picture is left to train on")
        self.training = _Batches(training, source, encoder, self.size)
        self.held_out = _Batches(held_out, source, encoder, self.size)

    def _check_captions(self, source: Source) -> None:
        captions = source.rows["caption"]
        missing = [source[i].name for i, text in enumerate(captions) if not (text or "").strip()]
        if not missing:
            return
        listed = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        message = f"{self.path}: {len(missing)} of {len(source)} pictures have no caption: {listed}"
        if not self.allow_missing_captions:
            raise UserError(f"{message}; write them, or set data.allow_missing_captions: true")
        log.warning("%s", message)

    def _entries(self, source: Source, encoder: Encoder | None) -> Iterator[Entry]:
        show = {"description": "encoding" if encoder else "reading", "transient": True}
        quiet = self.trainer is not None and not self.trainer.is_global_zero
        for index, sample in enumerate(track(source, total=len(source), disable=quiet, **show)):  # type: ignore[arg-type]
            caption = self.prefix + (sample.caption or "")
            digest = hashlib.sha256(sample.data).hexdigest()
            entry = Entry(index, Path(sample.name).name, caption, digest)
            try:
                if encoder is None:
                    open_picture(sample.data)
                else:
                    encoder.prepare(entry, sample.data)
            except OSError as error:
                if self.strict:
                    raise UserError(f"{sample.name}: unreadable ({error}); mend or remove it") from error
                self.unreadable.append(sample.name)
            else:
                yield entry

    def _report_unreadable(self, total: int) -> None:
        if self.unreadable:
            listed = ", ".join(self.unreadable)
            log.warning("%d of %d pictures are unreadable and left out: %s", len(self.unreadable), total, listed)

    def _is_held_out(self, entry: Entry) -> bool:
        text = entry.digest if self.split_by == "picture" else entry.caption.removeprefix(self.prefix)
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < self.validation_percent

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.training is not None
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))

        def consumed(batches: int) -> int:
            trainer = self.trainer
            return batches_consumed(trainer.global_step, batches, trainer.accumulate_grad_batches) if trainer else 0

        count = len(self.training)  # type: ignore[arg-type]
        return self._loader(self.training, EpochOrder(count, seed, consumed, self.batch_size))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        assert self.held_out is not None
        return self._loader(self.held_out) if len(self.held_out) else []  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.val_dataloader()

    def _loader(self, rows: Dataset[Any], sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        return DataLoader(
            rows,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )


class EpochOrder(Sampler[int]):
    """Every index once in each epoch, in an order that follows from seed and epoch alone.

    Where the run stands is asked for, not counted: after a resume the order goes on where it was.

    Args:
        count: of samples.
        seed: of the run.
        consumed: how many batches the run has trained on so far.
        batch_size: samples in a batch.
    """

    def __init__(
        self, count: int, seed: int, consumed: Callable[[int], int] = lambda _: 0, batch_size: int = 1
    ) -> None:
        self.count, self.seed, self.consumed, self.batch_size = count, seed, consumed, batch_size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        batches = -(-self.count // self.batch_size)
        epoch, done = divmod(self.consumed(batches), batches)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return iter(torch.randperm(self.count, generator=random).tolist()[done * self.batch_size :])


def batches_consumed(step: int, batches: int, accumulate: int) -> int:
    """Batches a run has trained on after `step` optimizer steps.

    Args:
        step: optimizer steps taken.
        batches: in an epoch.
        accumulate: batches to a step; the last step of an epoch may have fewer.
    """
    steps = -(-batches // accumulate)
    epoch, within = divmod(step, steps)
    return epoch * batches + within * accumulate


class _Batches(Dataset[dict[str, Any]]):
    def __init__(self, entries: list[Entry], source: Source, encoder: Encoder | None, size: int) -> None:
        self.entries, self.source, self.encoder, self.size = entries, source, encoder, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        sample: dict[str, Any] = {"name": entry.name, "caption": entry.caption}
        if self.encoder is None:
            picture = square(open_picture(self.source[entry.index].data), self.size)
            return sample | {"pixels": to_tensor(picture)}
        return sample | self.encoder.read(entry, lambda: self.source[entry.index].data)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: tensors are stacked, names and captions stay lists."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in ("name", "caption")}
    rest = [{key: value for key, value in sample.items() if key not in batch} for sample in samples]
    return batch | default_collate(rest)
