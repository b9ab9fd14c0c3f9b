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
    """Extract a LoRA from a fine-tuned checkpoint: the nearest B A to W - W_0 of each layer, by SVD.

    Args:
        base: the original checkpoint: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        tuned: the fine-tuned checkpoint, of the same architecture; it may be a folder where the other is a file.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: instead of rank: the share of each layer's squared Frobenius norm that the smallest rank must keep, such
            as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the tensors.
    """
    from loratune.lora.extract import extract as run

    say(run(base, tuned, out, rank, keep, to, dtype))
