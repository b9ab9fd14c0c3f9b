"""What a run leaves behind: a LoRA file that was read back and compared, or the weights of a base."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from loratune import __version__
from loratune.errors import UserError
from loratune.families.base import base_hash
from loratune.families.model import PREDICTION_KEY, ZERO_SNR_KEY
from loratune.families.save import configs_of, save_diffusers_folder
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.layers import LowRank
from loratune.lora.metadata import standard_metadata, tag_frequency
from loratune.lora.tokens import Embedding, write_embedding
from loratune.lora.verify import verify
from loratune.training.autoencoder import AutoencoderModule
from loratune.training.contrastive import ContrastiveModule
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.ema import averaged
from loratune.training.lora_module import LoRAModule
from loratune.training.sharding import draws

__all__ = ["Export", "verify"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECIPE_KEY = "loratune.recipe"
# What makes the layers of each kind, as sd-scripts' metadata call it, and its arguments.
MODULES: dict[str, tuple[str, dict[str, str] | None]] = {
    "lora": ("networks.lora", None),
    "dora": ("lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
    "loha": ("lycoris.kohya", {"algo": "loha"}),
    "lokr": ("lycoris.kohya", {"algo": "lokr"}),
}
PREDICTIONS = {"eps": "epsilon"}


def check_format(format: str, kind: str | None) -> None:
    """Raise UserError where a format cannot hold a kind of adapter."""
    if format == "peft" and kind in ("loha", "lokr"):
        raise UserError(f"export.format: peft cannot hold {kind}; set export.format: kohya")


class Export(L.Callback):
    """At the end of a run, write what was trained into the run's folder.

    A LoRA becomes lora.safetensors, with the recipe and the base's hash inside, and a new token
    learned_embeds.safetensors beside it; a VAE becomes the folder
    vae/, a text encoder text_encoder/, other weights of a base the folder base/, both in diffusers' layout.

    Args:
        format: keys of the LoRA file: peft (diffusers' own), or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the written tensors.
        every_n_steps: also write lora-STEP.safetensors (and the token's file) this often; 0 does not.
    """

    def __init__(
        self,
        format: Literal["peft", "kohya"] = "peft",
        dtype: Literal["float32", "float16", "bfloat16"] = "float16",
        every_n_steps: int = 0,
    ) -> None:
        self.format, self.dtype, self.every_n_steps = format, DTYPES[dtype], every_n_steps
        self.recipe = ""
        self._written_at = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what could not be written, before anything is trained."""
        if isinstance(pl_module, LoRAModule):
            check_format(self.format, pl_module.lora.type)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step % self.every_n_steps == 0 and step != self._written_at
        if due and isinstance(pl_module, LoRAModule):
            self._written_at = step
            self._write_lora(trainer, pl_module, f"lora-{step:06d}.safetensors")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if isinstance(pl_module, LoRAModule):
            self._write_lora(trainer, pl_module, "lora.safetensors")
        elif isinstance(pl_module, AutoencoderModule) and trainer.is_global_zero:
            with averaged(trainer, pl_module):
                pl_module.set_scale(trainer.train_dataloader or [])
                pl_module.vae.save_pretrained(folder / "vae")
        elif isinstance(pl_module, ContrastiveModule) and trainer.is_global_zero:
            pl_module.text_encoder().save_pretrained(folder / "text_encoder")
        elif isinstance(pl_module, DiffusionModule) and pl_module.model.family.pipeline and trainer.is_global_zero:
            with averaged(trainer, pl_module):
                save_diffusers_folder(pl_module.model, folder / f"base-{trainer.global_step}", self.dtype)

    def _write_lora(self, trainer: L.Trainer, module: LoRAModule, name: str) -> None:
        if not draws(trainer):
            return
        path = Path(trainer.default_root_dir) / name
        with averaged(trainer, module):
            layers, rows = module.layers(), module.rows()
        if not trainer.is_global_zero:
            return
        if layers:
            write_lora(path, LoRAFile(layers, self._metadata(trainer, module, layers)), self.format, self.dtype)
            verify(path, layers, self.format, self.dtype)
        if module.tokens is not None:
            path = path.with_name(name.replace("lora", "learned_embeds", 1))
            write_embedding(path, Embedding(module.tokens.token, rows), self.dtype, self._origin(trainer, module))

    def _metadata(self, trainer: L.Trainer, module: LoRAModule, layers: Mapping[str, LowRank]) -> dict[str, str]:
        return _standard(trainer, module, layers) | self._origin(trainer, module)

    def _origin(self, trainer: L.Trainer, module: LoRAModule) -> dict[str, str]:
        """Where a file comes from: the base, the recipe and how long it was trained."""
        return {
            "loratune.version": __version__,
            "loratune.base": module.base_name,
            "loratune.base_hash": base_hash(module.base_name),
            "loratune.steps": str(trainer.global_step),
            "loratune.targets": module.lora.targets,
            RECIPE_KEY: self.recipe,
            **_drawing(module),
        }


def _drawing(module: LoRAModule) -> dict[str, str]:
    """What has to be known to draw where it is not what the base says; `loratune sample` follows it.

    ss_ is sd-scripts' key, for people.
    """
    objective = module.objective
    told = {} if objective.prediction is None else {PREDICTION_KEY: objective.prediction}
    ends = {ZERO_SNR_KEY: "true", "ss_zero_terminal_snr": "True"}
    return told | (ends if objective.zero_terminal_snr else {})


def _standard(trainer: L.Trainer, module: LoRAModule, layers: Mapping[str, LowRank]) -> dict[str, str]:
    """What other programs show of a LoRA."""
    model = module.model
    configs = configs_of(model)
    maker, arguments = MODULES[module.lora.type]
    ranks, alphas = ({getattr(layer, key) for layer in layers.values()} for key in ("rank", "alpha"))
    return standard_metadata(
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
        name=Path(trainer.default_root_dir).name,
        base_model=model.family.kohya_version(configs),
        architecture=f"{model.family.modelspec(configs)}/lora",
        module=maker,
        arguments=arguments,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        resolution=getattr(_data(trainer), "size", None),
        prediction=PREDICTIONS.get(model.prediction, model.prediction),
        tags=_tags(trainer),
    )


def _data(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _tags(trainer: L.Trainer) -> str | None:
    """The tags of the training's captions, if its data have captions."""
    data = _data(trainer)
    captions: dict[str, list[str]] = {}
    for entry in getattr(getattr(data, "training", None), "entries", ()):
        captions.setdefault(Path(data.sources[entry.source].path).name, []).append(entry.caption)
    return tag_frequency(captions) if captions else None
