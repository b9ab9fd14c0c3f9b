"""An unconditional DDPM on pixels: the diffusion process with nothing around it (Ho 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from loratune.families.family import Architecture, Condition, LoadedModel, Part
from loratune.families.layouts import Config
from loratune.families.processes import PREDICTION_TYPES, DDPMFamily

if TYPE_CHECKING:
    from torch import Tensor

    from loratune.diffusion.schedule import NoiseSchedule
    from loratune.families.model import Model


class Pixels(DDPMFamily):
    """A U-Net on pixels, without text; it is not written to disk as a base."""

    name = "pixels"
    title = "a DDPM on pixels"
    parts = (Part("unet", "denoiser", "diffusers", "UNet2DModel", "", lambda config: iter(())),)
    batch_kind = "pixels"

    def fits(self, configs: Mapping[str, Config]) -> bool:
        return False

    def noise_schedule(self, scheduler: Mapping[str, Any]) -> NoiseSchedule:
        """Of the betas as they are, which diffusers' scheduler would round to float32."""
        import torch

        from loratune.diffusion.schedule import NoiseSchedule

        return NoiseSchedule.ddpm(torch.tensor(scheduler["trained_betas"], dtype=torch.float64))

    def image_size(self, configs: Mapping[str, Config]) -> tuple[int, int]:
        side = int(configs["unet"]["sample_size"])
        return side, side

    def latent_shape(self, configs: Mapping[str, Config], height: int, width: int) -> tuple[int, ...]:
        return (3, height, width)

    def x_0(self, model: LoadedModel, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        from loratune.formats.images import normalise

        return normalise(batch["pixels"])

    def encode_prompts(self, model: LoadedModel, captions: Sequence[str]) -> Condition:
        return {}

    def denoise(self, model: LoadedModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return cast("Tensor", model.network(x_t, t).sample)

    def decode(self, model: LoadedModel, x_0: Tensor) -> Tensor:
        return x_0


@dataclass
class PixelDDPM(Architecture):
    """A U-Net on pixels, without text.

    Args:
        size: side of an image in pixels.
        channels: width at each resolution; each one after the first halves the side.
        layers: residual blocks at each resolution.
        attention_from: resolutions with self-attention, counted from this one on (0 is the finest).
        betas: noise schedule.
        beta_start: first beta, where the schedule has one.
        beta_end: last beta, where the schedule has one.
        steps: T, the number of steps of the process.
        prediction: what the network predicts.
    """

    size: int = 32
    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 1
    attention_from: int = 2
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    prediction: Literal["eps", "v", "x0"] = "eps"

    def build(self) -> Model:
        from diffusers import UNet2DModel

        from loratune.diffusion.process import make_betas
        from loratune.families.model import Model

        plain, attending = self.attention_from, max(0, len(self.channels) - self.attention_from)
        unet = UNet2DModel(
            sample_size=self.size,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attending,
            up_block_types=("AttnUpBlock2D",) * attending + ("UpBlock2D",) * plain,
            norm_num_groups=min(32, self.channels[0] // 4),
        )
        scheduler = {
            "num_train_timesteps": self.steps,
            "trained_betas": make_betas(self.betas, self.steps, self.beta_start, self.beta_end).tolist(),
            "prediction_type": PREDICTION_TYPES[self.prediction],
            "clip_sample": True,
        }
        return Model(Pixels(), {"unet": unet}, scheduler)
