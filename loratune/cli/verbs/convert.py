"""`loratune convert`."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.choices import DType, Format
from loratune.cli.say import say


def convert(file: Path, /, to: Format, out: Path, dtype: DType | None = None, rank: int | None = None) -> None:
    """Convert a LoRA to another format: lossless; --rank allows an approximation.

    Args:
        file: a LoRA in any format.
        to: peft (diffusers' own), or kohya (ComfyUI, A1111, sd-scripts).
        out: a .safetensors file.
        dtype: of the tensors; by default the file's.
        rank: approximate at this rank, by SVD, what the format cannot hold, and print the error.
    """
    from loratune.lora.convert import convert as run

    say(run(file, to, out, dtype, rank))
