"""The two processes of the families: diffusion by betas (Ho 2020), and flow matching on the straight path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from loratune.errors import UserError
from loratune.families.family import Family

if TYPE_CHECKING:
    from loratune.diffusion.process import Prediction
    from loratune.diffusion.schedule import NoiseSchedule

PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What diffusers' schedulers call what a network predicts."""


class DDPMFamily(Family):
    """A family whose noise schedule follows from betas; a step's time is its index."""

    scheduler = "DDIMScheduler"
    samplers: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "ddim": "DDIMScheduler",
            "ddpm": "DDPMScheduler",
            "euler": "EulerDiscreteScheduler",
            "euler-a": "EulerAncestralDiscreteScheduler",
            "dpm++": "DPMSolverMultistepScheduler",
            "unipc": "UniPCMultistepScheduler",
        }
    )

    def prediction(self, scheduler: Mapping[str, Any], source: str = "") -> Prediction:
        """By the scheduler's prediction_type.

        Raises:
            UserError: it is not one of diffusers'.
        """
        kinds: dict[str, Prediction] = {name: kind for kind, name in PREDICTION_TYPES.items()}
        if (kind := scheduler.get("prediction_type", "epsilon")) not in kinds:
            raise UserError(f"{source}: prediction type '{kind}' of its scheduler is not one of {list(kinds)}")
        return kinds[kind]

    def noise_schedule(self, scheduler: Mapping[str, Any]) -> NoiseSchedule:
        """Of the betas that diffusers' scheduler makes, rescaled in float64 where it asks for it."""
        from diffusers import DDIMScheduler

        from loratune.diffusion.process import rescale_zero_terminal_snr
        from loratune.diffusion.schedule import NoiseSchedule

        betas = DDIMScheduler.from_config({**scheduler, "rescale_betas_zero_snr": False}).betas.double()
        rescaled = scheduler.get("rescale_betas_zero_snr")
        return NoiseSchedule.ddpm(rescale_zero_terminal_snr(betas) if rescaled else betas)

    def predicting(self, scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
        if prediction not in PREDICTION_TYPES:
            raise ValueError(f"prediction {prediction} is of flow matching; {self.title} takes {[*PREDICTION_TYPES]}")
        return {**scheduler, "prediction_type": PREDICTION_TYPES[prediction]}

    def ending_in_noise(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        return {**scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class FlowFamily(Family):
    """A family on the straight path x_t = (1 - sigma) x_0 + sigma e; a step's time is 1000 sigma."""

    scheduler = "FlowMatchEulerDiscreteScheduler"
    samplers: ClassVar[Mapping[str, str]] = MappingProxyType({"euler": "FlowMatchEulerDiscreteScheduler"})

    def prediction(self, scheduler: Mapping[str, Any], source: str = "") -> Prediction:
        return "flow"

    def noise_schedule(self, scheduler: Mapping[str, Any]) -> NoiseSchedule:
        from loratune.diffusion.schedule import NoiseSchedule

        return NoiseSchedule.flow(scheduler.get("num_train_timesteps", 1000))

    def predicting(self, scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
        if prediction != "flow":
            raise ValueError(f"prediction {prediction} is not of flow matching, as {self.title} is; leave it out")
        return dict(scheduler)

    def ending_in_noise(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        return dict(scheduler)

    def image_tokens(self, shape: Sequence[int]) -> int:
        """How many tokens the network makes of an x_0 of a shape, by which the schedule may be shifted."""
        return int(shape[-2] * shape[-1] // 4)

    def start_sampling(self, scheduler: Any, steps: int, shape: Sequence[int], device: Any) -> None:
        """With `use_dynamic_shifting` the shift is linear in the number of image tokens (Esser 2024, section 5.3.2)."""
        config = scheduler.config
        shift = {}
        if config.get("use_dynamic_shifting"):
            few, many = config["base_image_seq_len"], config["max_image_seq_len"]
            slope = (config["max_shift"] - config["base_shift"]) / (many - few)
            shift["mu"] = config["base_shift"] + slope * (self.image_tokens(shape) - few)
        scheduler.set_timesteps(steps, device=device, **shift)
