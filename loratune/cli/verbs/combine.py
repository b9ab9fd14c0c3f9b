"""`loratune combine`."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.choices import DType, Format
from loratune.cli.say import say


def combine(
    lora: list[str],
    out: Path,
    rank: int | None = None,
    to: Format | None = None,
    dtype: DType | None = None,
) -> None:
    """Combine LoRAs into one: sum w_i (alpha_i / r_i) B_i A_i; lossless (the ranks add up), or approximated at --rank.

    Args:
        lora: a LoRA file, or FILE:SCALE; repeat it. A scale may be negative.
        out: a .safetensors file.
        rank: of the result, by SVD, with the error printed; by default the sum of the ranks.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts); by default the first LoRA's.
        dtype: of the tensors; by default the widest of the LoRAs'.
    """
    from loratune.lora.combine import combine as run
    from loratune.lora.merge.request import parse

    say(run([parse(text) for text in lora], out, rank, to, dtype))
