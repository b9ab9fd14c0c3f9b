"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding and the image's size (Podell 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loratune.families.family import Condition, LoadedModel, Part
from loratune.families.layout_text import canonical_text_key, open_clip_projected_layers
from loratune.families.layouts import Config
from loratune.families.sd import NOTHING, TEXT_PART, UNET_PART, VAE_PART, StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "conditioner.embedders."


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion with a second text encoder, and a U-Net that is conditioned on more.

    A condition is `text` (B, 77 N, d1 + d2), the penultimate hidden states of both encoders side by side for N
    windows, and `pooled` (B, p), the projected last state of the second for the first window. `sizes` (B, 6) may be
    added in training: an image's own height and width, top and left of its crop, and the height and width it was
    brought to (Podell 2023, sec. 2.2); without them they are those of x_t.
    """

    name = "sdxl"
    title = "Stable Diffusion XL"
    parts = (
        UNET_PART,
        replace(VAE_PART, float32=True),  # its activations overflow in float16
        replace(TEXT_PART, prefix=f"{PREFIX}0.transformer.", kohya=("lora_te1_", "lora_te_")),
        Part(
            "text_encoder_2",
            "text_encoder",
            "transformers",
            "CLIPTextModelWithProjection",
            f"{PREFIX}1.model.",
            open_clip_projected_layers,
            block="te2",
            kohya=("lora_te2_",),
            canonical=canonical_text_key,
        ),
    )
    pipeline = "StableDiffusionXLPipeline"
    model_index = MappingProxyType(
        {"force_zeros_for_empty_prompt": True, "image_encoder": NOTHING, "feature_extractor": NOTHING}
    )
    tokenizers = MappingProxyType({"tokenizer": "<|endoftext|>", "tokenizer_2": "!"})
    configs = ("sdxl", "sdxl-inpainting")

    def fits(self, configs: Mapping[str, Config]) -> bool:
        is_xl = "unet" in configs and configs["unet"].get("addition_embed_type") == "text_time"
        return is_xl or "text_encoder_2" in configs

    def marks(self, configs: Mapping[str, Config]) -> tuple[str, ...]:
        """`v_pred` where it predicts v, `ztsnr` where its schedule ends in pure noise."""
        scheduler = configs["scheduler"]
        is_v, ends = scheduler.get("prediction_type") == "v_prediction", scheduler.get("rescale_betas_zero_snr")
        return tuple(key for key, marked in (("v_pred", is_v), ("ztsnr", ends)) if marked)

    def modelspec(self, configs: Mapping[str, Config]) -> str:
        return "stable-diffusion-xl-v1-base"

    def kohya_version(self, configs: Mapping[str, Config]) -> str:
        return "sdxl_base_v1-0"

    def text_parts(self, model: LoadedModel) -> dict[str, tuple[Any, Any]]:
        return super().text_parts(model) | {"text_encoder_2": (model.tokenizer_2, model.text_encoder_2)}

    def encode_prompts(self, model: LoadedModel, captions: Sequence[str]) -> Condition:
        """`text` (B, 77 N, d1 + d2) and `pooled` (B, p) for N windows; with several also `text_mask`.

        An empty caption is zeros: SDXL was trained so, and diffusers' pipeline guides away from zeros.
        """
        import torch

        from loratune.families.prompts import firsts

        conditions = []
        for part, (_, encoder) in self.text_parts(model).items():
            read = self.read(model, captions, part)
            output = encoder(read.ids.to(model.device, non_blocking=True), output_hidden_states=True)
            conditions.append(self.joined(model, output.hidden_states[-2].float(), read))
        pooled = output.text_embeds.float()
        if model.prompts.chunks > 1:
            pooled = pooled[torch.tensor(firsts(read.counts)).to(pooled.device, non_blocking=True)]
        empty = torch.tensor([not caption for caption in captions]).to(model.device, non_blocking=True)
        text = torch.cat([condition["text"] for condition in conditions], dim=-1)
        zeroed = {"text": text.masked_fill(empty[:, None, None], 0), "pooled": pooled.masked_fill(empty[:, None], 0)}
        return conditions[0] | zeroed

    def conditioned(self, condition: Condition, batch: Mapping[str, Any]) -> Condition:
        """With the images' sizes and crops, where the batch says them."""
        return {**condition, "sizes": batch["sizes"]} if "sizes" in batch else condition

    def time_ids(self, model: LoadedModel, x_t: Tensor) -> Tensor:
        """Original size, crop's corner and target size in pixels, each height first, (B, 6): x_t's, uncropped."""
        import torch

        height, width = (side * self.pixels_of_latent(model.configs()) for side in x_t.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return ids.to(x_t.device, non_blocking=True).expand(len(x_t), -1)

    def network_kwargs(self, model: LoadedModel, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        sizes = condition["sizes"] if "sizes" in condition else self.time_ids(model, x_t)
        added = {"text_embeds": condition["pooled"].to(model.network.dtype), "time_ids": sizes}
        return super().network_kwargs(model, x_t, condition) | {"added_cond_kwargs": added}

    # Autocast would run the float32 VAE in float16 all the same, and its activations pass 65504 there.
    def encode_images(self, model: LoadedModel, pixels: Tensor) -> dict[str, Tensor]:
        import torch

        with torch.autocast(pixels.device.type, enabled=False):
            return super().encode_images(model, pixels)

    def decode(self, model: LoadedModel, x_0: Tensor) -> Tensor:
        import torch

        with torch.autocast(x_0.device.type, enabled=False):
            return super().decode(model, x_0)
