"""Bases on disk: found by name, loaded from safetensors, written as a diffusers folder or a single file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.stable_diffusion import TOKENIZER, StableDiffusion
from loratune.formats.checkpoints import (
    architectures,
    canonical_text_keys,
    describe_unsupported,
    detect,
    from_single_file,
    module_text_keys,
)
from loratune.formats.files import atomic_folder, read_tensors, sha256_file, write_safetensors
from loratune.formats.headers import read_header

ASSETS = Path(__file__).parent.parent / "assets"
CONFIGS_KEY = "loratune.configs"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
Configs = dict[str, dict[str, Any]]


def builtin_names() -> list[str]:
    """Names of the embedded bases."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def find_base(name: str) -> Path:
    """The folder or file that a base's name stands for.

    Args:
        name: `builtin:NAME`, a diffusers folder, a `.safetensors` file, or a hub id such as `owner/model`.

    Raises:
        UserError: there is no such base, or it is a pickle.
    """
    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:")
        if name.removeprefix("builtin:") not in builtin_names():
            raise UserError(f"base {name}: there is no such embedded base; there is {builtin_names()}")
        return folder
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a pickle can run any code when it is opened; only .safetensors files are loaded")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path}: no model_index.json, so this is no diffusers folder")
    if path.exists():
        return path
    if path.suffix or path.is_absolute() or name.count("/") != 1:
        raise UserError(f"base {name}: no such file or folder (nor builtin:NAME, nor a hub id owner/model)")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "unet/*.safetensors", "vae/*.safetensors", "text_encoder*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"base {name}: no such folder here, and the hub did not give it: {reason}") from error


def base_hash(name: str) -> str:
    """sha256 of the file that holds a base's U-Net, as sd-scripts hashes models; "" for a base made in code."""
    try:
        path = find_base(name)
    except UserError:
        return ""
    return sha256_file(path / "unet" / WEIGHTS["unet"] if path.is_dir() else path)


def load_family(name: str, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """A base by name, with its weights in `dtype`.

    Raises:
        UserError: no such base, not safetensors, damaged, or of a family that is not supported.
    """
    path = find_base(name)
    configs, weights = read_folder(path) if path.is_dir() else read_single_file(path)
    return build(configs, weights, tokenizer_of(path), dtype, source=name)


def tokenizer_of(path: Path) -> CLIPTokenizer:
    """The base's own tokenizer, or CLIP's where it carries none."""
    own = path / "tokenizer"
    return CLIPTokenizer.from_pretrained(own if (own / "vocab.json").is_file() else TOKENIZER)


def configs_of_file(path: Path) -> Configs:
    """The configurations of a base, read without its weights.

    Raises:
        UserError: it is no checkpoint that is known.
    """
    if path.is_dir():
        return _folder_configs(path)
    header = read_header(path)
    if carried := header.metadata.get(CONFIGS_KEY):
        return dict(json.loads(carried))
    if found := detect(header):
        return architectures()[found]
    kind = describe_unsupported(header) or "not a checkpoint that is known here"
    raise UserError(f"{path}: {kind}; a base must be a Stable Diffusion 1.x checkpoint")


def _folder_configs(folder: Path) -> Configs:
    configs = {"scheduler": _read_json(folder / "scheduler" / "scheduler_config.json")}
    return configs | {part: _read_json(folder / part / "config.json") for part in WEIGHTS}


def read_folder(folder: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a diffusers folder, by component; text keys in their canonical form."""
    configs = _folder_configs(folder)
    weights = {part: read_tensors(folder / part / file) for part, file in WEIGHTS.items()}
    weights["text_encoder"] = canonical_text_keys(weights["text_encoder"])
    return configs, weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the base is not complete") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_single_file(path: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a single-file checkpoint, by component; its keys and shapes tell its kind."""
    configs = configs_of_file(path)
    return configs, from_single_file(read_tensors(path), configs)


def build(
    configs: Configs,
    weights: dict[str, dict[str, Tensor]],
    tokenizer: CLIPTokenizer,
    dtype: torch.dtype = torch.float32,
    source: str = "",
) -> StableDiffusion:
    """A base from configurations and weights; every weight must fit and none may be missing."""
    parts: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_config(_without_private(configs["unet"])),
        "vae": AutoencoderKL.from_config(_without_private(configs["vae"])),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_without_private(configs["text_encoder"]))),
    }
    for name, module in parts.items():
        found = weights[name]
        if name == "text_encoder":
            found = module_text_keys(found, module.state_dict().keys())
        try:
            module.load_state_dict(found)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{source}: the weights of its {name} do not fit its configuration: {reason}") from None
        module.to(dtype)
    return StableDiffusion(**parts, tokenizer=tokenizer, scheduler_config=configs["scheduler"], source=source)  # type: ignore[arg-type]


def _without_private(config: dict[str, Any]) -> dict[str, Any]:
    dropped = (
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
    )
    return {key: value for key, value in config.items() if key not in (*dropped, "architectures", "model_type")}


def configs_of(family: StableDiffusion) -> Configs:
    """The configurations of a base, as JSON can hold them."""
    configs: Configs = {"scheduler": {**family.scheduler_config, "_class_name": "DDIMScheduler"}}
    for name, module in family.components().items():
        config: Any = module.config
        raw = config.to_diff_dict() if name == "text_encoder" else dict(config)
        configs[name] = json.loads(json.dumps(_without_private(raw), default=list))
    return configs


def weights_of(family: StableDiffusion, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The weights of a base by component, rounded to `dtype`, text keys in their canonical form."""
    weights = {
        name: {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
        for name, module in family.components().items()
    }
    weights["text_encoder"] = canonical_text_keys(weights["text_encoder"])
    return weights


def save_diffusers_folder(family: StableDiffusion, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty.
    """
    write_folder(folder, configs_of(family), weights_of(family, dtype))


def write_folder(folder: Path, configs: Configs, weights: dict[str, dict[str, Tensor]]) -> None:
    """Write configurations and weights as a diffusers folder, whole or not at all."""
    with atomic_folder(folder) as temporary:
        for name, tensors in weights.items():
            (temporary / name).mkdir(parents=True)
            marked = {"_class_name": CLASSES[name], **configs[name]}
            if name == "text_encoder":
                marked = {"architectures": [CLASSES[name]], "model_type": "clip_text_model", **configs[name]}
            _write_json(temporary / name / "config.json", marked)
            write_safetensors(temporary / name / WEIGHTS[name], tensors, {"format": "pt"})
        _write_json(temporary / "scheduler" / "scheduler_config.json", configs["scheduler"])
        (temporary / "tokenizer").mkdir()
        for file in TOKENIZER.iterdir():
            (temporary / "tokenizer" / file.name).write_bytes(file.read_bytes())
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        index |= {name: ["transformers" if name == "text_encoder" else "diffusers", CLASSES[name]] for name in WEIGHTS}
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        _write_json(temporary / "model_index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
