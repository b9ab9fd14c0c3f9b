"""What every model family answers: how images and text become what the network takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loratune.diffusion.process import Prediction
from loratune.diffusion.schedule import NoiseSchedule

PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What diffusers' schedulers call what a network predicts."""

# Metadata of a file that was trained for another prediction or schedule than its base's.
PREDICTION_KEY = "loratune.prediction"
ZERO_SNR_KEY = "loratune.zero_terminal_snr"

Condition = dict[str, Tensor]
"""What the network is told beside x_t and t; every tensor has the batch first. Empty: nothing."""


class Family(nn.Module, ABC):
    """A diffusion model with everything around its network.

    Attributes:
        network: what predicts; called only through `denoise`.
        prediction: which mix of x_0 and noise the network predicts.
        noise_schedule: (a, b) at each of its T steps.
        batch_kind: what training data must hold: `pixels`, or `latents` (encoded once, then cached).
        scheduler_config: of the diffusers scheduler that draws samples.
    """

    network: Any
    prediction: Prediction
    noise_schedule: NoiseSchedule
    batch_kind: str = "latents"
    scheduler_config: dict[str, Any]

    def components(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by their name in a checkpoint."""
        return {"unet": self.network}

    def predict(self, prediction: Prediction) -> None:
        """Take the network's output for another prediction, here and in drawing."""
        self.prediction = prediction
        self.scheduler_config = {**self.scheduler_config, "prediction_type": PREDICTION_TYPES[prediction]}

    def end_in_noise(self) -> None:
        """Rescale the schedule so that its last step is pure noise, at which drawing then starts (Lin 2024)."""
        if self.noise_schedule.ends_in_noise:
            return
        self.noise_schedule = self.noise_schedule.ending_in_noise()
        told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.scheduler_config = {**self.scheduler_config, **told}

    def follow(self, metadata: Mapping[str, str]) -> None:
        """Draw as a file wants it that was trained for another prediction or schedule."""
        kinds: dict[str, Prediction] = {kind: kind for kind in PREDICTION_TYPES}
        if kind := kinds.get(metadata.get(PREDICTION_KEY, "")):
            self.predict(kind)
        if metadata.get(ZERO_SNR_KEY) == "true":
            self.end_in_noise()

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels in [-1, 1] (B, 3, H, W) as what is cached: the VAE's mean and log-variance."""
        raise TypeError(f"{type(self).__name__} works on pixels and has no VAE")

    @abstractmethod
    def x_0(self, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        """x_0 of a batch; `noise` (like x_0) draws from the VAE's posterior, None takes its mean."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one x_0 for an image of height x width pixels.

        Raises:
            UserError: a side that the model cannot take.
        """

    @abstractmethod
    def encode_prompts(self, captions: Sequence[str]) -> Condition:
        """What the network is told for each caption."""

    def text_settings(self) -> str:
        """What decides beside the weights what `encode_prompts` makes of a caption: a part of the text cache's keys."""
        return ""

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction for x_t at times t (B,) of its noise schedule; same shape as x_t."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 as pixels in about [-1, 1], (B, 3, H, W)."""

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device


def repeat_condition(condition: Condition, count: int) -> Condition:
    """A condition of batch 1, for a batch of `count`."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Several conditions as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
