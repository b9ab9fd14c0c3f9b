"""The precision of a run that names none: the one that its device computes fastest without losing a style."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["bf16-mixed", "16-mixed", "32-true"]


def fast_precision(accelerator: str) -> Precision:
    """Lightning's name of the precision for a device.

    Mixed bfloat16 where the device has units for it. A CPU without them computes bfloat16 in software, which took
    11 times as long as float32 where it was measured (a VAE's step on a CPU with AVX2 alone). A GPU without them
    gets mixed float16, with Lightning's gradient scaler.

    Args:
        accelerator: as Lightning's trainer takes it: auto, cpu, gpu, cuda, mps and so on.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator == "mps" or (accelerator in ("auto", "gpu") and torch.backends.mps.is_available()):
        return "32-true"  # not measured there
    return "bf16-mixed" if cpu_has_bfloat16() else "32-true"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX, or Arm's)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(flags.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
