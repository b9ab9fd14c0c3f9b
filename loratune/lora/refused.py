"""Kinds of adapter that are not read, told by a key, so that they are refused by name; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first pattern that a key of the file fits counts.
REFUSED: tuple[tuple[str, str], ...] = (
    (r"^bundle_emb\.", "an embedding bundled with a LoRA; put it in a file of its own"),
    (r"^lllite_", "a ControlNet-LLLite, which is no LoRA"),
    (r"\.(oft_blocks|oft_diag|oft_[rRsS]|boft_[RrsS]|boft_blocks)\b", "an OFT or BOFT"),
    (r"\.on_input$|\.ia3_l\b", "an IA3"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA (LyCORIS)"),
    (r"\.(w_norm|b_norm)$", "trained norms (LyCORIS)"),
    (r"\.diff(_b)?$", "whole weights beside a LoRA (LyCORIS full)"),
    (r"\.(bias_indices|bias_values|bias_size)$", "a LyCORIS with sparse biases"),
    (r"\.(vera_lambda|hra_u|lora_E|lora_embedding_[AB]|loha_|randlora_|fourierft_)", "another adapter of peft"),
    (r"^(lora_unet_|lycoris_)(double|single)_blocks_|(^|\.)(double|single)_blocks\.", "a FLUX LoRA"),
    (r"(^|\.)single_transformer_blocks\.", "a FLUX LoRA"),
    (r"^lora_unet_joint_blocks_|(^|\.)joint_blocks\.|^lora_te3_|^text_encoder_3\.", "a Stable Diffusion 3 LoRA"),
    (r"^lora_prior_|^prior\.", "a LoRA of Stable Cascade"),
    (r"^(lora_transformer_|transformer\.|base_model\.model\.transformer\.)", "a LoRA of a transformer (SD 3, FLUX)"),
    (r"^diffusion_model\.", "a LoRA with ComfyUI's names of another model"),
)


def refused(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first key that tells a kind of file that is not read, and the kind; or None."""
    for key in keys:
        for pattern, kind in REFUSED:
            if re.search(pattern, key):
                return key, kind
    return None
