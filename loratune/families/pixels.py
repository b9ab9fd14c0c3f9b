"""An unconditional DDPM on pixels: the diffusion process with nothing around it (Ho 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from diffusers import UNet2DModel
from torch import Tensor

from loratune.diffusion.process import Prediction, ScheduleName, make_betas
from loratune.diffusion.schedule import NoiseSchedule
from loratune.families.family import Condition, Family
from loratune.formats.images import normalise


class PixelDDPM(Family):
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

    batch_kind = "pixels"

    def __init__(
        self,
        size: int = 32,
        channels: tuple[int, ...] = (64, 128, 128),
        layers: int = 1,
        attention_from: int = 2,
        betas: ScheduleName = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        steps: int = 1000,
        prediction: Prediction = "eps",
    ) -> None:
        super().__init__()
        self.size, self.prediction = size, prediction
        plain, attending = attention_from, max(0, len(channels) - attention_from)
        self.network = UNet2DModel(
            sample_size=size,
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attending,
            up_block_types=("AttnUpBlock2D",) * attending + ("UpBlock2D",) * plain,
            norm_num_groups=min(32, channels[0] // 4),
        )
        schedule = make_betas(betas, steps, beta_start, beta_end)
        self.noise_schedule = NoiseSchedule.ddpm(schedule)
        self.scheduler_config = {
            "num_train_timesteps": steps,
            "trained_betas": schedule.tolist(),
            "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
            "clip_sample": True,
        }

    def x_0(self, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        return normalise(batch["pixels"])

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (3, height, width)

    def encode_prompts(self, captions: Sequence[str]) -> Condition:
        return {}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return cast(Tensor, self.network(x_t, t).sample)

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0
