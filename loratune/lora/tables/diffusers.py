"""diffusers' names before peft's: `unet.` and the path with `.lora.down.weight`, and the attention processors of 2023.

The processors' layers were `to_q_lora` beside `attn1.processor`, in text encoders too (state_dict_utils.py:45-172).
"""

from __future__ import annotations

from loratune.lora.tables.peft import PEFT, alpha
from loratune.lora.tables.table import ALPHA, DOWN, UP, Table, bare, dotted

OLD_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def spell_old(name: str) -> tuple[str, ...]:
    """Names before `_lora.down.weight`; none for a layer that these processors did not have."""
    for attention in (".attn1.", ".attn2."):
        path, found, layer = name.partition(attention)
        if found and layer in OLD_ATTENTION:
            whole = f"{path}{attention}processor.{OLD_ATTENTION[layer]}"
            return (whole, *bare((whole,)))
    path, found, layer = name.partition(".self_attn.")
    if found and layer in OLD_TEXT:
        inside = (OLD_TEXT[layer], f"{layer}.{OLD_TEXT[layer]}")  # the second is early diffusers' (its PR 2918)
        spelt = tuple(one for end in inside for one in dotted(f"{path}.self_attn.{end}"))
        return (*spelt, *bare(spelt))
    return ()


DIFFUSERS = Table(
    "diffusers",
    PEFT.begins,
    {
        ".lora.down.weight": DOWN,
        ".lora.up.weight": UP,
        ".lora_linear_layer.down.weight": DOWN,
        ".lora_linear_layer.up.weight": UP,
        ".alpha": ALPHA,
    },
    dotted,
    loose=True,
    alpha=alpha,
)
OLD_DIFFUSERS = Table(
    "old diffusers",
    r"(^|\.)(processor|self_attn)(\.\w+_proj)?\.to_(q|k|v|out)$",
    {"_lora.down.weight": DOWN, "_lora.up.weight": UP, "_lora.alpha": ALPHA},
    spell_old,
    alpha=alpha,
)
