"""What a run leaves behind: a LoRA file that was read back and compared, or the weights of a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from safetensors import safe_open
from torch import Tensor

from loratune import __version__
from loratune.errors import UserError
from loratune.families.files import PIPELINES, base_hash, save_diffusers_folder
from loratune.families.stable_diffusion import StableDiffusion
from loratune.formats.lora import LoRAFile, standard_metadata, write_lora
from loratune.formats.lora_layers import LoRALayer
from loratune.training.autoencoder import AutoencoderModule
from loratune.training.contrastive import ContrastiveModule
from loratune.training.ema import averaged
from loratune.training.lora_module import LoRAModule

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECIPE_KEY = "loratune.recipe"


class Export(L.Callback):
    """At the end of a run, write what was trained into the run's folder.

    A LoRA becomes lora.safetensors, with the recipe and the base's hash inside; a VAE becomes the folder
    vae/, a text encoder text_encoder/, other weights of a base the folder base/, both in diffusers' layout.

    Args:
        format: keys of the LoRA file: peft (diffusers' own), or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the written tensors.
        every_n_steps: also write lora-STEP.safetensors this often; 0 does not.
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
        elif isinstance(family := getattr(pl_module, "family", None), StableDiffusion) and trainer.is_global_zero:
            with averaged(trainer, pl_module):
                save_diffusers_folder(family, folder / f"base-{trainer.global_step}", self.dtype)

    def _write_lora(self, trainer: L.Trainer, module: LoRAModule, name: str) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / name
        with averaged(trainer, module):
            layers = module.layers()
        write_lora(path, LoRAFile(layers, self._metadata(trainer, module)), self.format, self.dtype)
        verify(path, layers, self.format, self.dtype)

    def _metadata(self, trainer: L.Trainer, module: LoRAModule) -> dict[str, str]:
        lora = module.lora
        family = module.family
        kind = PIPELINES[family.pipeline].lora_metadata if isinstance(family, StableDiffusion) else {}
        title = Path(trainer.default_root_dir).name
        made = {
            "loratune.version": __version__,
            "loratune.base": module.base_name,
            "loratune.base_hash": base_hash(module.base_name),
            "loratune.steps": str(trainer.global_step),
            "loratune.targets": lora.targets,
            RECIPE_KEY: self.recipe,
        }
        return standard_metadata(rank=lora.rank, alpha=lora.scaled_alpha, name=title, **kind) | made


def verify(path: Path, layers: dict[str, LoRALayer], format: str, dtype: torch.dtype) -> None:
    """Read a LoRA file as another program would and compare every (alpha / r) B A with the one in training.

    Shares no code with the writer: names by each format's published rule, tensors by safetensors' library.

    Raises:
        UserError: a layer is missing or differs by more than the rounding to `dtype` can explain.
    """
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, layer in layers.items():
        down, up, scale = _as_read(name, found, metadata, format)
        read = scale * up.flatten(1) @ down.flatten(1)
        trained = layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
        # Each of B and A is off by at most eps relative, or by the smallest number where that is coarser.
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = scale * ((2.1 * eps + 1e-6) * layer.up.abs().flatten(1) + tiny) @ (layer.down.abs().flatten(1) + tiny)
        if not bool(((read - trained).abs() <= bound + 1e-12).all()):
            raise UserError(f"{path}: {name} reads back as another B A than was trained; do not use this file")


def _as_read(
    name: str, found: dict[str, Tensor], metadata: dict[str, str], format: str
) -> tuple[Tensor, Tensor, float]:
    try:
        if format == "peft":
            down, up = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
            component = name.split(".")[0]
            carried = json.loads(metadata["lora_adapter_metadata"])
            return down, up, carried[f"{component}.lora_alpha"] / carried[f"{component}.r"]
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[name.split(".")[0]]
        key = prefix + name.split(".", 1)[1].replace(".", "_")
        down = found[f"{key}.lora_down.weight"]
        alpha = float(found.get(f"{key}.alpha", torch.tensor(float(len(down)))))
        return down, found[f"{key}.lora_up.weight"], alpha / len(down)
    except KeyError as error:
        raise UserError(f"{name}: reads back without {error}; do not use this file") from None
