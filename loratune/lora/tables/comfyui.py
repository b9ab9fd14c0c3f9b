"""ComfyUI's own names, `diffusion_model.` and the original path; and bare paths, as a network saves itself.

ComfyUI takes any suffix with any name (comfy/lora.py); its LoraSave node and OneTrainer write lora_up or lora_B, and
alpha as a tensor.
"""

from __future__ import annotations

from loratune.lora.names import originals
from loratune.lora.tables.peft import SUFFIXES, alpha
from loratune.lora.tables.table import DOWN, UP, Table, bare, dotted

# What ComfyUI calls the text encoders: clip_l in SD 1.x and SDXL, clip_h in SD 2.x, clip_g in SDXL.
TEXT = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}


def spell(name: str) -> tuple[str, ...]:
    """ComfyUI's names of a layer."""
    component, _, path = name.partition(".")
    if component in TEXT:
        return tuple(f"text_encoders.{part}.transformer.{path}" for part in TEXT[component])
    return tuple(f"diffusion_model.{one}" for one in (*originals().get(name, ()), path))


def spell_bare(name: str) -> tuple[str, ...]:
    """A layer's path without its component, diffusers' or the original one."""
    return (*bare(dotted(name)), *originals().get(name, ()))


COMFYUI = Table(
    "ComfyUI",
    r"^(diffusion_model|text_encoders)\.",
    {**SUFFIXES, ".lora_down.weight": DOWN, ".lora_up.weight": UP},
    spell,
)
BARE = Table("bare names", "", SUFFIXES, spell_bare, alpha=alpha)
