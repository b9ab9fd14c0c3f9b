"""What libraries say that no user can act on is not shown; what they can act on is."""

from __future__ import annotations

import logging
import warnings

LOGGERS = {
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # an optional kernel package for 4-bit products
    "diffusers.models.modeling_utils": logging.ERROR,  # an empty list of modules to keep in float32
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,  # devices found, tips, "max_steps reached"
    "lightning.fabric.utilities.seed": logging.WARNING,
    "datasets": logging.ERROR,
    "httpx": logging.WARNING,
}
WARNINGS = (
    "LightningCLI's args parameter",  # it doubts arguments given in code; here they are the process's own
    ".*LeafSpec",
    ".*exists and is not empty",  # the folder of checkpoints, on a resume
    ".*does not have many workers",  # samples come from a memory-mapped cache
    ".*in eval mode at the start of training",  # the frozen parts
    ".*your dataloader is not resumable",  # it is: the order follows from the batches consumed
    ".*smaller than the logging interval",
    ".*when logging on epoch level in distributed",  # every process computes the same
    ".*`isinstance\\(treespec",
    ".*lr_scheduler.step",
    "Detected call of",
)


def quiet() -> None:
    """Call before the libraries are imported."""
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
