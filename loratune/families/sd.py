"""Stable Diffusion 1.x and 2.x: AutoencoderKL, CLIP text, U-Net with cross-attention (Rombach 2022)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loratune.diffusion.process import Prediction, rescale_zero_terminal_snr
from loratune.diffusion.schedule import NoiseSchedule
from loratune.errors import UserError
from loratune.families.family import PREDICTION_TYPES, Condition, Family
from loratune.families.prompts import Prompts, Windows, filled, join, weigh, windows

TOKENIZER = Path(__file__).parent.parent / "assets" / "clip-tokenizer"
PREDICTIONS: dict[str, Prediction] = {name: kind for kind, name in PREDICTION_TYPES.items()}
WHENCE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


log = logging.getLogger(__name__)


def check_side(side: int, factor: int) -> None:
    """Raise UserError for an image's side, in pixels, that a VAE cannot halve often enough."""
    if side % factor:
        raise UserError(f"size {side}: the VAE needs a multiple of {factor}")


class StableDiffusion(Family):
    """A base in the standard classes, put together from its parts.

    Args:
        unet: the network.
        vae: images to latents and back.
        text_encoder: captions to vectors.
        tokenizer: captions to tokens.
        scheduler_config: of a diffusers scheduler; its betas and prediction type are the model's.
        source: where the base came from, for messages and metadata.

    Attributes:
        pipeline: diffusers' class of pipeline for it, which names it in a folder's model_index.json.
    """

    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    network: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
        source: str = "",
    ) -> None:
        super().__init__()
        self.network, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler_config, self.source = tokenizer, dict(scheduler_config), source
        kind = scheduler_config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise UserError(f"{source}: prediction type '{kind}' of its scheduler is not one of {list(PREDICTIONS)}")
        self.prediction = PREDICTIONS[kind]
        self.prompts = Prompts()
        self._told_cut: set[str] = set()
        betas = DDIMScheduler.from_config({**scheduler_config, "rescale_betas_zero_snr": False}).betas.double()
        if scheduler_config.get("rescale_betas_zero_snr"):
            betas = rescale_zero_terminal_snr(betas)
        self.noise_schedule = NoiseSchedule.ddpm(betas)
        self.vae.requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)

    def components(self) -> dict[str, nn.Module]:
        return {"unet": self.network, "text_encoder": self.text_encoder, "vae": self.vae}

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}

    def x_0(self, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        latents = batch["mean"]
        if noise is not None:
            latents = latents + (0.5 * batch["logvar"]).exp() * noise
        shift = self.vae.config.get("shift_factor") or 0.0
        return cast(Tensor, (latents - shift) * self.vae.config["scaling_factor"])

    @property
    def vae_factor(self) -> int:
        """How many pixels a latent's side is."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.vae_factor
        for side in (height, width):
            check_side(side, factor)
        return (self.vae.config["latent_channels"], height // factor, width // factor)

    def text_parts(self) -> dict[str, tuple[Any, Any]]:
        """Each text encoder's tokenizer and itself, by the encoder's name in `components`."""
        return {"text_encoder": (self.tokenizer, self.text_encoder)}

    def windows(self, captions: Sequence[str], part: str = "text_encoder") -> Windows:
        """Captions as the windows of a text encoder; what does not fit is named in a warning, once."""
        tokenizer, encoder = self.text_parts()[part]
        made = windows(captions, tokenizer, encoder.config.max_position_embeddings, self.prompts)
        for caption, lost in made.cut.items():
            if caption not in self._told_cut:
                self._told_cut.add(caption)
                log.warning(
                    "prompt %r: cut before %r; shorten it, or set prompts.chunks above %d",
                    caption,
                    lost,
                    self.prompts.chunks,
                )
        return made

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids, padded to the encoder's window, (B, 77); of every window that the captions fill."""
        return self.windows(captions).ids

    def encode_prompts(self, captions: Sequence[str]) -> Condition:
        """What the network is told for each caption: `text` (B, 77 N, d) for N windows.

        With several windows `text_mask` (B, 77 N) is true where a caption fills one.
        """
        made = self.windows(captions)
        states = self.text_encoder(made.ids.to(self.device, non_blocking=True)).last_hidden_state.float()
        return self.joined(states, made)

    def joined(self, states: Tensor, made: Windows) -> Condition:
        """The states of windows (M, 77, d), weighed and side by side as the network is told them."""
        if self.prompts.weighting:
            states = weigh(states, made.weights)
        chunks = self.prompts.chunks
        told = {"text": join(states, made.counts, chunks)}
        if chunks > 1:
            width = states.shape[1]
            mask = filled(made.counts, chunks).repeat_interleave(width, 1)
            told["text_mask"] = mask.to(states.device, non_blocking=True)
        return told

    def text_settings(self) -> str:
        parts = [_encodes(tokenizer, encoder) for tokenizer, encoder in self.text_parts().values()]
        said = {"family": type(self).__name__, "prompts": asdict(self.prompts), "parts": parts}
        return json.dumps(said, sort_keys=True, default=str)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.network(x_t.to(self.network.dtype), t, **self.network_kwargs(x_t, condition)).sample
        return cast(Tensor, output.float())

    def network_kwargs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network's call takes beside x_t and t."""
        told = {"encoder_hidden_states": condition["text"].to(self.network.dtype)}
        if "text_mask" in condition:
            told["encoder_attention_mask"] = condition["text_mask"]
        return told

    def decode(self, x_0: Tensor) -> Tensor:
        shift = self.vae.config.get("shift_factor") or 0.0
        latents = x_0 / self.vae.config["scaling_factor"] + shift
        return cast(Tensor, self.vae.decode(latents.to(self.vae.dtype)).sample.float())


def _encodes(tokenizer: Any, encoder: Any) -> dict[str, Any]:
    """What decides beside the weights what a text encoder makes of a caption, wherever and by whatever it was saved."""
    config = {key: value for key, value in encoder.config.to_diff_dict().items() if key not in WHENCE}
    whole = tokenizer.backend_tokenizer.to_str()
    reads = whole[whole.index('"added_tokens"') :]  # before it: padding and truncation as the last call left them
    return {
        "encoder": config,
        "tokenizer": hashlib.sha256(reads.encode()).hexdigest(),
        "pad": tokenizer.pad_token_id,
    }


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder of some width and depth, with CLIP's window of 77 tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class NewStableDiffusion(StableDiffusion):
    """A U-Net and a CLIP text encoder with random weights around a VAE that was trained before.

    Args:
        vae: a diffusers folder with the VAE.
        channels: U-Net width at each resolution.
        heads: attention heads at each resolution.
        layers: residual and attention blocks at each resolution.
        text_encoder: a folder with a text encoder that was trained before; none makes a new one.
        text_width: width of the text encoder, and of cross-attention's keys and values.
        text_layers: depth of the text encoder.
        latent_size: side of the latents.
        prediction: what the network predicts.
        zero_terminal_snr: rescale the schedule so that the last step is pure noise (Lin 2024).
    """

    def __init__(
        self,
        vae: Path,
        channels: tuple[int, ...] = (64, 128, 160),
        heads: tuple[int, ...] = (2, 4, 5),
        layers: int = 1,
        text_encoder: Path | None = None,
        text_width: int = 128,
        text_layers: int = 4,
        latent_size: int = 16,
        prediction: Prediction = "v",
        zero_terminal_snr: bool = True,
    ) -> None:
        if not (Path(vae) / "config.json").is_file():
            raise UserError(f"{vae}: no VAE here; train one with recipes/pretrain/vae.yaml first")
        if zero_terminal_snr and prediction == "eps":
            raise UserError("zero_terminal_snr: pure noise tells an eps model nothing; use prediction: v")
        trained = AutoencoderKL.from_pretrained(vae, local_files_only=True, use_safetensors=True)
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=trained.config["latent_channels"],
            out_channels=trained.config["latent_channels"],
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels),
            attention_head_dim=heads,
            cross_attention_dim=text_width,
            norm_num_groups=min(32, channels[0] // 4),
        )
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        encoder = CLIPTextModel(text_config(tokenizer, text_width, text_layers))
        if text_encoder is not None:
            encoder = CLIPTextModel.from_pretrained(text_encoder, local_files_only=True, use_safetensors=True)
        scheduler = {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": PREDICTION_TYPES[prediction],
            "rescale_betas_zero_snr": zero_terminal_snr,
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
        }
        super().__init__(unet, trained, encoder, tokenizer, scheduler, source="new")
