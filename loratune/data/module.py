"""Captioned images -> cached latents and text embeddings -> batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import lightning as L
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from loratune.data.augment import Augment, corner
from loratune.data.buckets import Buckets
from loratune.data.captions import Captions
from loratune.data.collection import Collection
from loratune.data.encode import Encoder, Looks, pixels_of
from loratune.data.entries import MIDDLE, Draw, Entry
from loratune.data.masks import mask_tensor
from loratune.data.order import BatchOrder, TrainingLoader, groups, in_order, often
from loratune.data.settings import SourceConfig, gathered, left_out
from loratune.data.shares import Rows, Shares
from loratune.data.sources import read_source
from loratune.errors import UserError
from loratune.families.conditions import stack_conditions
from loratune.formats.images import normalise

log = logging.getLogger(__name__)
NAMED = 10


class CaptionedImages(L.LightningDataModule):
    """Captioned images as training batches, their latents and text embeddings cached on disk.

    Args:
        path: a folder with .txt captions, metadata.jsonl or metadata.csv; a .jsonl, .csv or .parquet file; a folder
            that datasets saved; a .tar file of a webdataset, or a folder of them; a hub dataset.
        resolution: side in pixels of the square that images are resized and cropped to; with buckets, the side of a
            square of their area.
        batch_size: images in a batch, of each process.
        caption_prefix: put before every caption (a trigger word).
        validation_percent: share of the images held out for the validation loss, 0 to 50.
        split_by: what the split hashes: the image's bytes, or its caption.
        image_column: the column of images, for parquet, datasets and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt. A list is several.
        allow_missing_captions: train images without a caption on the caption prefix alone.
        strict: check every image before the run and stop at unreadable images, missing or truncated captions,
            train/validation leakage and masks that do not fit.
        cache_dir: folder of the cached latents and text embeddings, shared between runs.
        num_workers: processes that decode images and load batches.
        sources: several sources in place of path, each with its own caption_prefix, repeats or weight, role and masks.
        buckets: aspect-ratio buckets: images keep about their shape, and a batch has images of one size. Without them
            the middle square of each image is taken.
        captions: how an image's caption is chosen and changed in each step.
        augment: random changes of training images.
        cache_latents: encode each image once and keep its latents in cache_dir; false encodes it in each step, which is
            slower and which colour augmentation needs.
    """

    def __init__(
        self,
        path: str | None = None,
        resolution: int = 512,
        batch_size: int = 1,
        caption_prefix: str = "",
        validation_percent: int = 5,
        split_by: Literal["image", "caption"] = "image",
        image_column: str = "image",
        caption_column: str | None = None,
        allow_missing_captions: bool = False,
        strict: bool = False,
        cache_dir: Path = Path("~/.cache/loratune"),
        num_workers: int = 0,
        sources: list[SourceConfig] | None = None,
        buckets: Buckets | None = None,
        captions: Captions = Captions(),  # noqa: B008 (frozen)
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        cache_latents: bool = True,
    ) -> None:
        super().__init__()
        for key, value, least, most in (
            ("resolution", resolution, 8, 8192),
            ("batch_size", batch_size, 1, 65536),
            ("validation_percent", validation_percent, 0, 50),
            ("num_workers", num_workers, 0, 1024),
        ):
            if not least <= value <= most:
                raise ValueError(f"data.{key} is {value}; give {least} to {most}")
        if augment.colours and cache_latents:
            colour, far = next(iter(augment.colours.items()))
            reason = "colours can only change where images are encoded in each step"
            raise ValueError(f"data.augment.{colour} is {far}: {reason}; set data.cache_latents: false, or {colour}: 0")
        if buckets is not None:
            buckets.sizes(resolution**2)  # raises where none fits
        short = {"caption_prefix": caption_prefix, "image_column": image_column, "caption_column": caption_column}
        self.sources = [source for source in gathered(path, sources, short) if not left_out(source)]
        self.resolution, self.batch_size, self.num_workers = resolution, batch_size, num_workers
        self.cache_dir = cache_dir
        self.validation_percent, self.split_by = validation_percent, split_by
        self.allow_missing_captions, self.strict = allow_missing_captions, strict
        self.buckets, self.captions, self.augment, self.cache_latents = buckets, captions, augment, cache_latents
        self.unreadable: list[str] = []
        self.encoded = 0
        self.training: Samples | None = None
        self.held_out: Samples | None = None

    @cached_property
    def collection(self) -> Collection:
        """The sources, opened.

        Raises:
            UserError: one cannot be read, or has no images.
        """
        opened = [read_source(source.path, source.image_column, source.caption_column) for source in self.sources]
        for source, config in zip(opened, self.sources, strict=True):
            if not len(source):
                raise UserError(f"{config.path}: holds no images; leave this source out")
        settings = (self.buckets, self.captions, self.augment, self.validation_percent, self.split_by)
        return Collection(self.sources, opened, self.resolution, *settings)

    def check(self, warn: bool = True) -> None:
        """See, by names, captions and the headers of images with masks, that the sources can be trained on.

        Args:
            warn: tell what is no error; `setup` does, so who checks before it need not.

        Raises:
            UserError: a source is empty, an image has no caption, or a mask has another size than its image.
        """
        collection = self.collection
        if warn:
            self._tell_skipped(collection)
        self._check_captions(collection, warn)
        for number, masks in enumerate(collection.masks):
            if masks is not None:
                self._check_masks(number, collection, warn)

    def _tell_skipped(self, collection: Collection) -> None:
        for config, source in zip(self.sources, collection.sources, strict=True):
            if source.skipped:
                names = _listed([f"{name} ({reason})" for name, reason in source.skipped.items()])
                log.warning("%s: %d files are not used: %s", config.path, len(source.skipped), names)

    def _check_captions(self, collection: Collection, warn: bool) -> None:
        missing = [name for source in collection.sources for name in source.without_caption()]
        if not missing:
            return
        where = ", ".join(source.path for source in self.sources)
        message = f"{where}: {len(missing)} of {len(collection)} images have no caption: {_listed(missing)}"
        if not self.allow_missing_captions:
            raise UserError(f"{message}; write them, or set data.allow_missing_captions: true")
        if warn:
            log.warning("%s", message)

    def _check_masks(self, number: int, collection: Collection, warn: bool) -> None:
        config, source = self.sources[number], collection.sources[number]
        bare = []
        for index, sample in enumerate(source):
            try:
                if not collection.entry(number, index, sample).mask:
                    bare.append(Path(sample.name).name)
            except OSError:
                continue  # reported when it is read
        if len(bare) == len(source):
            raise UserError(
                f"{config.masks}: has a mask for none of the images of {config.path}; give them their names"
            )
        if bare and warn:
            log.warning("%s: %d images have no mask and count whole: %s", config.masks, len(bare), _listed(bare))

    def setup(self, stage: str) -> None:
        """Read the sources, say what is wrong with them, and encode what is not in the cache yet."""
        if self.training is not None:
            return
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        collection = self.collection
        self.check()
        encoder = self._encoder(module) if module.batch_kind == "latents" else None
        training: list[Entry] = []
        held_out: list[Entry] = []
        for entry in self._entries(collection, encoder):
            (held_out if collection.is_held_out(entry) else training).append(entry)
        for number, source in enumerate(self.sources):
            if not any(entry.source == number for entry in (*training, *held_out)):
                raise UserError(f"{source.path}: no image is left to train on")
        if not any(self.sources[entry.source].role == "training" for entry in training):
            raise UserError(f"{self.sources[0].path}: no image is left to train on")
        self.training = Samples(training, collection, encoder, self.cache_latents)
        self.held_out = Samples(held_out, collection, encoder, self.cache_latents)

    def check_sizes(self, model: Any) -> None:
        """See that a base can be given the recipe's sizes.

        Args:
            model: has `latent_shape`, which raises UserError for a side that it cannot take.

        Raises:
            UserError: it cannot; the message names the key.
        """
        try:
            side = self.resolution if self.buckets is None else self.buckets.step
            model.latent_shape(side, side)
        except UserError as error:
            key = "resolution" if self.buckets is None else "buckets.step"
            raise UserError(f"data.{key}: {error}; change data.{key}") from None

    def _encoder(self, module: Any) -> Encoder:
        assert self.trainer is not None
        self.check_sizes(module.model)
        text = module.text_is_frozen and not self.captions.changes_tags
        encoder = Encoder(module.model, self.cache_dir, text)
        encoder.model.to(self.trainer.strategy.root_device)
        return encoder

    def _entries(self, collection: Collection, encoder: Encoder | None) -> list[Entry]:
        """The readable images; each process of a run encodes its share of them."""
        assert self.trainer is not None
        rank, processes = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        numbers = range(rank, len(collection), processes)
        cached = None if encoder is None or not self.cache_latents else (encoder.cache, encoder.keys)
        looks = DataLoader(
            Looks(collection, numbers, cached), batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is
        )
        results: list[Entry | tuple[str, str]] = []
        show = {"description": "encoding" if encoder else "reading", "transient": True}
        for look in track(looks, total=len(numbers), disable=not self.trainer.is_global_zero, **show):  # type: ignore[arg-type]
            if isinstance(look.result, Entry) and encoder is not None:
                encoder.prepare(look.result, look.pixels, collection.cached_captions(look.result))
                self.encoded += bool(look.pixels)
            results.append(look.result)
            if self.strict and not isinstance(look.result, Entry):
                break
        if processes > 1:
            every: list[Any] = [None] * processes
            torch.distributed.all_gather_object(every, results)
            longest = max(map(len, every))
            results = [part[at] for at in range(longest) for part in every if at < len(part)]
        self._report_unreadable([result for result in results if not isinstance(result, Entry)], len(collection))
        return [result for result in results if isinstance(result, Entry)]

    def _report_unreadable(self, lost: Sequence[tuple[str, str]], total: int) -> None:
        if self.strict and lost:
            name, fault = lost[0]
            raise UserError(f"{name}: unreadable ({fault}); mend or remove it")
        self.unreadable = [name for name, _ in lost]
        if lost:
            log.warning("%d of %d images are unreadable and left out: %s", len(lost), total, ", ".join(self.unreadable))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Encode images that are not cached, on the run's device."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        if self.cache_latents or module is None or module.batch_kind != "latents":
            return batch
        with torch.no_grad():
            return batch | module.model.encode_images(normalise(batch["pixels"]))

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.training is not None
        entries, processes = self.training.entries, getattr(self.trainer, "world_size", 1)
        counts = [sum(entry.source == number for entry in entries) for number in range(len(self.sources))]
        order = BatchOrder(
            groups(entries, often(self.sources, counts)),
            [entry.bucket for entry in entries],
            self.batch_size * processes,
            int(os.environ.get("PL_GLOBAL_SEED", "0")),
            bool(getattr(self.trainer, "overfit_batches", 0)),
            getattr(self.trainer, "limit_train_batches", 1.0),
        )
        if processes == 1:
            return TrainingLoader(order, **self._loading(self.training, order))
        assert self.trainer is not None
        shares = Shares(order, self.trainer.global_rank, processes)
        return TrainingLoader(order, **self._loading(Rows(self.training), shares))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        assert self.held_out is not None
        batches = in_order([entry.bucket for entry in self.held_out.entries], self.batch_size)
        return DataLoader(**self._loading(self.held_out, batches)) if batches else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.val_dataloader()

    def _loading(self, rows: Dataset[Any], batches: Any) -> dict[str, Any]:
        return {
            "dataset": rows,
            "batch_sampler": batches,
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _as_it_is(value: Any) -> Any:
    return value


class Samples(Dataset[dict[str, Any]]):
    """Encoded samples, by index, or by a `Draw`, from which everything random about them follows.

    Args:
        entries: the samples.
        collection: where their images are.
        encoder: reads them from the cache; none gives pixels.
        cache_latents: give latents; if false, pixels all the same, which the training encodes.
    """

    def __init__(
        self, entries: list[Entry], collection: Collection, encoder: Encoder | None, cache_latents: bool = True
    ) -> None:
        self.entries, self.collection, self.encoder = entries, collection, encoder
        self.cached = encoder is not None and cache_latents
        self.weighed = any(source.loss_weight != 1 for source in collection.settings)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        draw = draw if isinstance(draw, Draw) else Draw(draw)
        entry, collection = self.entries[draw.sample], self.collection
        random = Random(f"{draw.place} {entry.digest}") if draw.place else None
        view = collection.augment.draw(entry.size, entry.bucket, random) if random else MIDDLE
        caption = collection.captions.draw(entry.captions, entry.prefix, random) if random else entry.caption

        def pixels() -> Tensor:
            varied = (lambda image: collection.augment.colour(image, random)) if random else None
            return pixels_of(collection.sample(entry).data, entry.bucket, view, varied)

        sample: dict[str, Any] = {"name": entry.name, "caption": caption}
        if self.encoder is not None and self.cached:
            sample |= self.encoder.posterior(entry, view, pixels)
        else:
            sample["pixels"] = pixels()
        if self.encoder is not None:
            left, top = corner(entry.size, entry.bucket, view)
            sizes = (*entry.size[::-1], top, left, *entry.bucket[::-1])
            sample["sizes"] = torch.tensor(sizes, dtype=torch.float32)
            if self.encoder.text:
                sample["condition"] = self.encoder.condition(caption)
        if self.weighed:
            sample["loss_weight"] = torch.tensor(entry.loss_weight, dtype=torch.float32)
        if collection.masked:
            sample["mask"] = self._mask(entry, view, sample)
        return sample

    def _mask(self, entry: Entry, view: Any, sample: dict[str, Any]) -> Tensor:
        if self.encoder is None or not self.cached:
            return mask_tensor(self.collection.mask(entry), entry.bucket, view)
        height, width = sample["mean"].shape[-2:]
        return self.encoder.mask(entry, view, (height, width), lambda: self.collection.mask(entry))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: tensors are stacked, conditions of unequal length padded; names and captions stay lists."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in ("name", "caption")}
    if "share" in samples[0]:
        batch["share"] = samples[0]["share"]
    if "condition" in samples[0]:
        batch["condition"] = stack_conditions([sample["condition"] for sample in samples])
    rest = [{key: value for key, value in sample.items() if key not in batch} for sample in samples]
    return batch | default_collate(rest)
