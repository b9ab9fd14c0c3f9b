"""The VAE, trained before the diffusion model: reconstruction + KL (Rombach 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from loratune.diffusion.objective import psnr
from loratune.formats.images import normalise
from loratune.training.export import Target
from loratune.training.randomness import training_generator
from loratune.training.schedules import LRSchedule, of_step, optimizer_and_schedule


def laplacian_pyramid_loss(x: Tensor, y: Tensor, levels: int = 3) -> Tensor:
    """L1 between Laplacian pyramids, finer levels first (Bojanowski 2018, GLO, eq. 3).

    Plain L1 lets a decoder answer a doubtful edge with a blur; here each band of detail is compared
    on its own, so an edge that is missing costs on its own level. x, y: (B, C, H, W). Returns a scalar.
    """
    total = x.new_zeros(())
    for _ in range(levels):
        x_low, y_low = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        x_detail = x - F.interpolate(x_low, scale_factor=2, mode="bilinear")
        y_detail = y - F.interpolate(y_low, scale_factor=2, mode="bilinear")
        total = total + F.l1_loss(x_detail, y_detail)
        x, y = x_low, y_low
    return total


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) per element, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


class AutoencoderModule(L.LightningModule):
    """Train a KL autoencoder on images.

    Args:
        channels: width at each resolution; each one after the first halves the side.
        latent_channels: channels of the latent.
        layers: residual blocks at each resolution.
        kl_weight: weight of the mean KL per latent element against the mean error per pixel.
        detail_weight: weight of the Laplacian-pyramid term that keeps edges sharp.
        optimizer: any torch optimizer.
        lr_schedule: the learning rate over the run.
    """

    batch_kind = "pixels"

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 128),
        latent_channels: int = 4,
        layers: int = 1,
        kl_weight: float = 5e-4,
        detail_weight: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.kl_weight, self.detail_weight = kl_weight, detail_weight
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=layers,
            latent_channels=latent_channels,
            norm_num_groups=min(32, channels[0] // 4),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches
        random = training_generator(self.device, self.global_step, part, self.global_rank)
        x = normalise(batch["pixels"])
        mirrored = torch.rand(len(x), 1, 1, 1, generator=random, device=self.device) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.sample(random)).sample.float()
        pixel, detail = F.l1_loss(y, x), laplacian_pyramid_loss(y, x)
        kl = gaussian_kl(posterior.mean.float(), posterior.logvar.float()).mean()
        loss = pixel + self.detail_weight * detail + self.kl_weight * kl
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({"train/l1": pixel, "train/detail": detail, "train/kl": kl})
        return of_step(self.trainer, loss, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = normalise(batch["pixels"])
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.mean).sample.float()
        size = x.shape[0]
        self.log("val/psnr", psnr(y, x).mean(), prog_bar=True, batch_size=size)
        self.log("val/l1", F.l1_loss(y, x), batch_size=size)
        self.log("val/latent_std", posterior.mean.float().std(), batch_size=size)

    @torch.no_grad()
    def set_scale(self, batches: Iterable[dict[str, Any]], most: int = 32) -> None:
        """Set the scaling factor that gives latents unit variance (Rombach 2022, appendix G), from some batches."""
        encoded = [
            self.vae.encode(normalise(batch["pixels"]).to(self.device)).latent_dist.mean.float()
            for batch in islice(batches, most)
        ]
        self.vae.register_to_config(scaling_factor=round(1 / float(torch.cat(encoded).std()), 5))

    def save(self, target: Target) -> list[Path]:
        """Write the VAE as diffusers' folder vae/, with its scaling factor."""
        folder = target.folder / "vae"
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.set_scale(data.train_dataloader())  # a loader of its own: the run's counts the batches it is asked for
        self.vae.save_pretrained(folder)
        return [folder]

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, self.vae.parameters(), self.optimizer, self.lr_schedule)
