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
    """Change a LoRA's rank: the nearest B A of each layer, by SVD, with the error printed.

    Args:
        file: a LoRA in any format.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: instead of rank: the share of each layer's squared Frobenius norm that the smallest rank must keep, such
            as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts); by default the file's.
        dtype: of the tensors; by default the file's.
    """
    from loratune.lora.resize import resize as run

    say(run(file, out, rank, keep, to, dtype))
