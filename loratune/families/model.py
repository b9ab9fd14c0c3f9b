"""A base in memory: its parts with their weights, asked through its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.diffusion.process import Prediction
from loratune.families.family import Condition, Configs, Family, Role
from loratune.families.prompts import Prompts

# Metadata of a file that was trained for another prediction or schedule than its base's.
PREDICTION_KEY = "loratune.prediction"
ZERO_SNR_KEY = "loratune.zero_terminal_snr"
PREDICTIONS: tuple[Prediction, ...] = ("eps", "v", "x0", "flow")


class Model(nn.Module):
    """A diffusion model with everything around its network.

    Args:
        family: what knows how its parts work together.
        parts: modules by component; they become attributes of these names.
        scheduler_config: of a diffusers scheduler; its noise schedule and prediction type are the model's.
        tokenizers: by folder, likewise.
        source: where it came from, for messages and metadata.

    Attributes:
        prediction: which mix of x_0 and noise the network predicts.
        noise_schedule: (a, b) at each of its T steps.
        prompts: how captions become what text encoders read.
    """

    def __init__(
        self,
        family: Family,
        parts: Mapping[str, nn.Module],
        scheduler_config: Mapping[str, Any],
        tokenizers: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        self.family, self.source, self.part_names = family, source, tuple(parts)
        for name, value in {**parts, **(tokenizers or {})}.items():
            setattr(self, name, value)
        self.scheduler_config = dict(scheduler_config)
        self.prediction = family.prediction(scheduler_config, source)
        self.noise_schedule = family.noise_schedule(scheduler_config)
        self.prompts = Prompts()
        self.warned: set[str] = set()
        family.prepare(self)

    def __getattr__(self, name: str) -> Any:
        """A component or a tokenizer."""
        return super().__getattr__(name)

    @property
    def network(self) -> Any:
        """The denoiser; called only through `denoise`."""
        return getattr(self, self.family.denoiser.name)

    @property
    def batch_kind(self) -> str:
        """What training data must hold: `pixels`, or `latents`."""
        return self.family.batch_kind

    def components(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by their name in a checkpoint."""
        return {name: getattr(self, name) for name in self.part_names}

    def names(self, role: Role) -> tuple[str, ...]:
        """The components with a role."""
        return tuple(part.name for part in self.family.parts if part.role == role and part.name in self.part_names)

    def configs(self) -> Configs:
        """The configurations of its components."""
        return {name: cast(Any, part).config for name, part in self.components().items()}

    def predict(self, prediction: Prediction) -> None:
        """Take the network's output for another prediction, here and in sampling.

        Raises:
            ValueError: its family does not know it.
        """
        self.scheduler_config = self.family.predicting(self.scheduler_config, prediction)
        self.prediction = prediction

    def end_in_noise(self) -> None:
        """Rescale the schedule so that its last step is pure noise, at which sampling then starts (Lin 2024)."""
        if self.noise_schedule.ends_in_noise:
            return
        self.noise_schedule = self.noise_schedule.ending_in_noise()
        self.scheduler_config = self.family.ending_in_noise(self.scheduler_config)

    def follow(self, metadata: Mapping[str, str]) -> None:
        """Sample as a file wants it that was trained for another prediction or schedule."""
        kinds: dict[str, Prediction] = {kind: kind for kind in PREDICTIONS}
        if kind := kinds.get(metadata.get(PREDICTION_KEY, "")):
            self.predict(kind)
        if metadata.get(ZERO_SNR_KEY) == "true":
            self.end_in_noise()

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels in [-1, 1] (B, 3, H, W) as what is cached: the VAE's mean and log-variance."""
        return self.family.encode_images(self, pixels)

    def x_0(self, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        """x_0 of a batch; `noise` (like x_0) draws from the VAE's posterior, None takes its mean."""
        return self.family.x_0(self, batch, noise)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one x_0 for an image of height x width pixels.

        Raises:
            UserError: a side that the model cannot take.
        """
        return self.family.latent_shape(self.configs(), height, width)

    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that it was made for."""
        return self.family.image_size(self.configs())

    def encode_prompts(self, captions: Sequence[str]) -> Condition:
        """What the network is conditioned on for each caption."""
        return self.family.encode_prompts(self, captions)

    def text_parts(self) -> dict[str, tuple[Any, Any]]:
        """Each text encoder's tokenizer and itself, by name, where they take new tokens."""
        return self.family.text_parts(self)

    def text_settings(self) -> str:
        """What decides beside the weights what `encode_prompts` makes of a caption."""
        return self.family.text_settings(self)

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """Words of a caption and the places of their tokens in cross-attention; none where it cannot be traced."""
        return self.family.words(self, caption)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction for x_t at times t (B,) of its noise schedule; same shape as x_t."""
        return self.family.denoise(self, x_t, t, condition)

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 as pixels in about [-1, 1], (B, 3, H, W)."""
        return self.family.decode(self, x_0)

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(iter(self.network.parameters())).device
