"""`loratune extract`."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.choices import DType, Format
from loratune.cli.say import say


def extract(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None = None,
    keep: float | None = None,
    to: Format = "peft",
    dtype: DType = "float16",
) -> None:
    """Write the LoRA that turns one checkpoint into another: the nearest B A to W - W_0 of each layer.

    Args:
        base: the checkpoint before: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        tuned: the checkpoint after, of the same architecture; it may be a folder where the other is a file.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: or for each layer the smallest rank that keeps this share of its squared Frobenius norm, such as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the tensors.
    """
    from loratune.lora.extract import extract as run

    say(run(base, tuned, out, rank, keep, to, dtype))
