"""The text encoder trained on its own: captions and images brought together (Radford 2021, CLIP)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from loratune.families.sd import TEXT_PART, TOKENIZER, text_config
from loratune.families.single_file import module_keys
from loratune.formats.images import normalise
from loratune.training.export import Target
from loratune.training.schedules import LRSchedule, of_step, optimizer_and_schedule


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosine similarities: each image picks its text, each text its image.

    (Radford 2021, figure 3.) Unit vectors (B, D) each, and the inverse temperature. Returns a scalar.
    """
    logits = scale * images @ texts.T
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


class ContrastiveModule(L.LightningModule):
    """Train a CLIP text encoder beside a small image tower on captioned images.

    Args:
        size: side of the images in pixels.
        patch: side of the image tower's patches in pixels.
        width: of both towers.
        layers: depth of both towers.
        optimizer: any torch optimizer.
        lr_schedule: the learning rate over the run.
    """

    batch_kind = "pixels"

    def __init__(
        self,
        size: int = 64,
        patch: int = 8,
        width: int = 128,
        layers: int = 4,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch is {patch}; give a divisor of size {size}")
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        text = text_config(self.tokenizer, width, layers)
        heads = {"num_attention_heads": text.num_attention_heads, "intermediate_size": 4 * width}
        vision = {"image_size": size, "patch_size": patch, "hidden_size": width, "num_hidden_layers": layers, **heads}
        self.clip: Any = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=width))

    def similarity(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit vectors of a batch's images and captions, (B, width) each."""
        tokens = self.tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt")
        output = self.clip(input_ids=tokens.input_ids.to(self.device), pixel_values=normalise(batch["pixels"]))
        return output.image_embeds.float(), output.text_embeds.float()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, texts = self.similarity(batch)
        loss = contrastive_loss(images, texts, self.clip.logit_scale.exp().clamp(max=100))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(texts))
        return of_step(self.trainer, loss, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, texts = self.similarity(batch)
        right = (images @ texts.T).argmax(0) == torch.arange(len(texts), device=self.device)
        self.log("val/right_image_in_batch", right.float().mean(), prog_bar=True, batch_size=len(texts))

    def text_encoder(self) -> CLIPTextModel:
        """The text tower alone, as Stable Diffusion takes it."""
        encoder = CLIPTextModel(self.clip.config.text_config)
        weights = self.clip.text_model.state_dict()
        encoder.load_state_dict(module_keys(TEXT_PART, weights, encoder.state_dict().keys()))
        return encoder

    def save(self, target: Target) -> list[Path]:
        """Write the text encoder as transformers' folder text_encoder/."""
        folder = target.folder / "text_encoder"
        self.text_encoder().save_pretrained(folder)
        return [folder]

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, self.clip.parameters(), self.optimizer, self.lr_schedule)
