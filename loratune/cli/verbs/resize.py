"""`loratune resize`."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.choices import DType, Format
from loratune.cli.say import say


def resize(
    file: Path,
    /,
    out: Path,
    rank: int | None = None,
    keep: float | None = None,
    to: Format | None = None,
    dtype: DType | None = None,
) -> None:
    """Give a LoRA another rank: the nearest B A of each layer, by SVD, with the error printed.

    Args:
        file: a LoRA in any format.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: or for each layer the smallest rank that keeps this share of its squared Frobenius norm, such as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts); by default as the file.
        dtype: of the tensors; by default as they are.
    """
    from loratune.lora.resize import resize as run

    say(run(file, out, rank, keep, to, dtype))
