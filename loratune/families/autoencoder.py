"""Families whose images are the latents of an AutoencoderKL (Kingma 2014, Rombach 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from loratune.errors import UserError
from loratune.families.family import Family, LoadedModel
from loratune.families.layouts import Config

if TYPE_CHECKING:
    from torch import Tensor


class LatentFamily(Family):
    """A family whose component `vae` is an AutoencoderKL with a shift and a scale of its latents."""

    patch = 1
    """Latents that are one token of the network's on each side."""

    def prepare(self, model: LoadedModel) -> None:
        model.vae.requires_grad_(False)

    def pixels_of_latent(self, configs: Mapping[str, Config]) -> int:
        """How many pixels a latent's side is."""
        return int(2 ** (len(configs["vae"].get("block_out_channels", ("",))) - 1))

    def latent_shape(self, configs: Mapping[str, Config], height: int, width: int) -> tuple[int, ...]:
        factor = self.pixels_of_latent(configs)
        check_size(height, width, factor * self.patch)
        return (int(configs["vae"].get("latent_channels", 4)), height // factor, width // factor)

    def image_size(self, configs: Mapping[str, Config]) -> tuple[int, int]:
        side = int(configs[self.denoiser.name]["sample_size"] * self.pixels_of_latent(configs))
        return side, side

    def encode_images(self, model: LoadedModel, pixels: Tensor) -> dict[str, Tensor]:
        posterior = model.vae.encode(pixels.to(model.vae.dtype)).latent_dist
        return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}

    def x_0(self, model: LoadedModel, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        latents = batch["mean"]
        if noise is not None:
            latents = latents + (0.5 * batch["logvar"]).exp() * noise
        shift = model.vae.config.get("shift_factor") or 0.0
        return cast("Tensor", (latents - shift) * model.vae.config["scaling_factor"])

    def decode(self, model: LoadedModel, x_0: Tensor) -> Tensor:
        shift = model.vae.config.get("shift_factor") or 0.0
        latents = x_0 / model.vae.config["scaling_factor"] + shift
        return cast("Tensor", model.vae.decode(latents.to(model.vae.dtype)).sample.float())


def check_size(height: int, width: int, factor: int) -> None:
    """Raise UserError for a size in pixels whose sides are no multiples of a factor."""
    for side in (height, width):
        if side % factor:
            raise UserError(f"size {side}: the VAE needs a multiple of {factor}")
