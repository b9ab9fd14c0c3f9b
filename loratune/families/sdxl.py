"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding and the image's size (Podell 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loratune.families.family import Condition
from loratune.families.prompts import firsts
from loratune.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion with a second text encoder, and a U-Net that is told more.

    A condition is `text` (B, 77 N, d1 + d2), the penultimate hidden states of both encoders side by side for N
    windows, and `pooled` (B, p), the projected last state of the second for the first window. `sizes` (B, 6) may be
    added in training: an image's own height and width, top and left of its crop, and the height and width it was
    brought to (Podell 2023, sec. 2.2); without them they are those of x_t.

    Args:
        unet: the network; its `addition_embed_type` is `text_time`.
        vae: images to latents and back; it is used in float32, as its activations overflow in float16.
        text_encoder: captions to vectors of width d1.
        text_encoder_2: captions to vectors of width d2, and to one of width p.
        tokenizer: captions to tokens for text_encoder.
        tokenizer_2: captions to tokens for text_encoder_2.
        scheduler_config: of a diffusers scheduler; its betas and prediction type are the model's.
        source: where the base came from, for messages and metadata.
    """

    pipeline = "StableDiffusionXLPipeline"
    text_encoder_2: Any
    tokenizer_2: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler_config: dict[str, Any],
        source: str = "",
    ) -> None:
        super().__init__(unet, vae, text_encoder, tokenizer, scheduler_config, source)
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2

    def components(self) -> dict[str, nn.Module]:
        return super().components() | {"text_encoder_2": self.text_encoder_2}

    def text_parts(self) -> dict[str, tuple[Any, Any]]:
        return super().text_parts() | {"text_encoder_2": (self.tokenizer_2, self.text_encoder_2)}

    def encode_prompts(self, captions: Sequence[str]) -> Condition:
        """What the network is told for each caption: `text` (B, 77 N, d1 + d2) and `pooled` (B, p) for N windows.

        With several windows `text_mask` (B, 77 N) is true where a caption fills one. An empty caption is told as
        zeros: SDXL was trained so, and diffusers' pipeline guides away from zeros.
        """
        conditions = []
        for part, (_, encoder) in self.text_parts().items():
            made = self.windows(captions, part)
            output = encoder(made.ids.to(self.device, non_blocking=True), output_hidden_states=True)
            conditions.append(self.joined(output.hidden_states[-2].float(), made))
        pooled = output.text_embeds.float()
        if self.prompts.chunks > 1:
            pooled = pooled[torch.tensor(firsts(made.counts)).to(pooled.device, non_blocking=True)]
        empty = torch.tensor([not caption for caption in captions]).to(self.device, non_blocking=True)
        text = torch.cat([one["text"] for one in conditions], dim=-1)
        told = {"text": text.masked_fill(empty[:, None, None], 0), "pooled": pooled.masked_fill(empty[:, None], 0)}
        return conditions[0] | told

    def time_ids(self, x_t: Tensor) -> Tensor:
        """Original size, crop's corner and target size in pixels, each height first, (B, 6): x_t's, uncropped."""
        height, width = (side * self.vae_factor for side in x_t.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return ids.to(x_t.device, non_blocking=True).expand(len(x_t), -1)

    def network_kwargs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        sizes = condition["sizes"] if "sizes" in condition else self.time_ids(x_t)
        added = {"text_embeds": condition["pooled"].to(self.network.dtype), "time_ids": sizes}
        return super().network_kwargs(x_t, condition) | {"added_cond_kwargs": added}

    # Autocast would run the float32 VAE in float16 all the same, and its activations pass 65504 there.
    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(pixels.device.type, enabled=False):
            return super().encode_images(pixels)

    def decode(self, x_0: Tensor) -> Tensor:
        with torch.autocast(x_0.device.type, enabled=False):
            return super().decode(x_0)
