"""What a model family is: facts that need no torch, and how its networks are asked; each family is one file.

A family has no state. What is loaded of one base is a `model.Model`, which hands itself to the family's methods.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from loratune.families.layouts import Config, Layer, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from loratune.diffusion.process import Prediction
    from loratune.diffusion.schedule import NoiseSchedule
    from loratune.formats.headers import Header

Configs = dict[str, dict[str, Any]]
"""Configurations by component, the scheduler's among them; `model_index` has the pipeline's `_class_name`."""

Condition: TypeAlias = "dict[str, Tensor]"
"""What a network is conditioned on beside x_t and t; every tensor has the batch first. Empty: nothing."""

Role = Literal["denoiser", "text_encoder", "vae"]
Layers = Callable[[Config], Iterator[Layer]]
FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
NONE: Mapping[str, Any] = MappingProxyType({})
# What says where a configuration was saved and by whom, not what the model is.
PRIVATE = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)


def without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration as its constructor takes it."""
    return {key: value for key, value in config.items() if key not in PRIVATE}


def same_key(key: str) -> str | None:
    """A key as it is, for components whose names never changed."""
    return key


@dataclass(frozen=True)
class Part:
    """A component with weights.

    Args:
        name: of its folder in a diffusers folder; canonical names of its layers begin with it.
        role: what it does.
        library: that its class is of, diffusers or transformers.
        class_name: of its module.
        prefix: what its keys in the single file begin with.
        layers: those of a configuration, with their places in the single file.
        block: what blocks of its layers are called by, such as te1.
        blocks: shorter names of what its layers' names begin with, such as `down` for `down_blocks`.
        kohya: what kohya's names of its layers begin with; the first is written.
        canonical: a key's name today, whichever version wrote it; None for a buffer that is no weight.
        float32: whether it is used in float32 whatever is asked for.
        shards: classes of the blocks that are cut over devices one by one.
        exact: a regular expression of names of linear layers that are never quantised.
    """

    name: str
    role: Role
    library: str
    class_name: str
    prefix: str
    layers: Layers
    block: str = ""
    blocks: tuple[tuple[str, str], ...] = ()
    kohya: tuple[str, ...] = ()
    canonical: Callable[[str], str | None] = same_key
    float32: bool = False
    shards: tuple[str, ...] = ()
    exact: str = r"(?!)"

    @property
    def file(self) -> str:
        """The name of the file with its weights in a diffusers folder."""
        return FILES.get(self.library, FILES["diffusers"])

    @property
    def adaptable(self) -> bool:
        """Whether LoRAs can sit in it."""
        return self.role != "vae"

    def cls(self) -> Any:
        """The class of its module."""
        return getattr(import_module(self.library), self.class_name)

    def new(self, config: Config) -> Any:
        """A module of a configuration, with the weights that its class gives it."""
        cls, plain = self.cls(), without_private(config)
        return cls.from_config(plain) if hasattr(cls, "from_config") else cls(cls.config_class(**plain))


class LoadedModel(Protocol):
    """A base in memory, which is a `model.Model`; components and tokenizers are attributes."""

    def __getattr__(self, name: str) -> Any: ...


class Family(ABC):
    """A model family; the facts are attributes, and what needs torch is imported where it is used.

    Attributes:
        name: of its layout in a single file, such as sdxl.
        title: for people.
        parts: its components with weights, in the order of the single file.
        pipeline: diffusers' class for it; "" for a family that is not written to disk.
        model_index: what else is in a folder's model_index.json.
        tokenizers: the token that each of its tokenizers pads with, by folder.
        tokenizer_class: of transformers.
        configs: names of its known architectures, folders of `configs/`.
        targets: regular expressions of the layers that LoRAs adapt, by the name of the preset.
        text_targets: likewise in its text encoders.
        samplers: classes of diffusers' schedulers that draw with it, by short name; the first is the default.
        scheduler: the class of scheduler in a folder.
        batch_kind: what training data must hold: `pixels`, or `latents` (encoded once, then cached).
        windows: whether text encoders read windows of tokens, of which a prompt can have several.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]
    pipeline: ClassVar[str] = ""
    model_index: ClassVar[Mapping[str, Any]] = NONE
    tokenizers: ClassVar[Mapping[str, str]] = NONE
    tokenizer_class: ClassVar[str] = ""
    configs: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[Mapping[str, str]] = NONE
    text_targets: ClassVar[str] = r"(?!)"
    samplers: ClassVar[Mapping[str, str]]
    scheduler: ClassVar[str]
    batch_kind: ClassVar[str] = "latents"
    windows: ClassVar[bool] = False

    @property
    def denoiser(self) -> Part:
        """The network."""
        return next(part for part in self.parts if part.role == "denoiser")

    def part(self, name: str) -> Part:
        """A component by its name."""
        return next(part for part in self.parts if part.name == name)

    # What it is on disk.

    @abstractmethod
    def fits(self, configs: Mapping[str, Config]) -> bool:
        """Whether a base with these configurations is of this family."""

    def architectures(self) -> dict[str, Configs]:
        """The configurations of its known architectures, by name."""
        folders = {name: Path(__file__).parent / "configs" / name for name in self.configs}
        return {name: _read(folder) for name, folder in folders.items()}

    def title_of(self, configs: Mapping[str, Config]) -> str:
        """What a base is called, for people."""
        return self.title

    def variant(self, configs: Mapping[str, Config]) -> str:
        """What a base is for: text to image, or something that is not trained here."""
        return "text to image"

    def pipeline_of(self, configs: Mapping[str, Config]) -> str:
        """diffusers' class of pipeline for a base."""
        return self.pipeline

    def pipelines(self) -> tuple[str, ...]:
        """All of diffusers' classes of pipeline for it."""
        return (self.pipeline,) if self.pipeline else ()

    def distinctive(self, configs: Mapping[str, Config]) -> dict[str, Shape]:
        """A few tensors of the single file, found without all layers, by which an architecture is told from others."""
        return {}

    def ignored(self, configs: Mapping[str, Config]) -> tuple[str, ...]:
        """Beginnings of keys that single files may hold and that are no weights."""
        return ()

    def stated(self, header: Header) -> dict[str, Any]:
        """What a single file says of its noise schedule, as a diffusers scheduler has it; {} where it says nothing."""
        return {}

    def complete(self, configs: Configs, header: Header, values: Callable[[str], Any]) -> None:  # noqa: B027
        """Put into configurations what a single file's header leaves open.

        Args:
            configs: changed in place.
            header: of the file.
            values: a tensor of the file as a numpy array, by key.
        """

    def marks(self, configs: Mapping[str, Config]) -> tuple[str, ...]:
        """Keys of empty tensors by which single files say more of themselves."""
        return ()

    def originals(self, configs: Mapping[str, Config]) -> dict[str, str]:
        """Names without prefix, in the single file, of the denoiser's layers, by canonical name (`unet.conv_in`)."""
        part = self.denoiser
        return {f"{part.name}.{layer.name}": layer.ldm for layer in part.layers(configs[part.name])}

    def modelspec(self, configs: Mapping[str, Config]) -> str:
        """Stability's modelspec name of an architecture; a LoRA's has `/lora` after it."""
        return self.name

    def kohya_version(self, configs: Mapping[str, Config]) -> str:
        """sd-scripts' `ss_base_model_version`."""
        return self.name

    def image_size(self, configs: Mapping[str, Config]) -> tuple[int, int]:
        """(height, width) in pixels of the images that a base was made for."""
        raise NotImplementedError

    def latent_shape(self, configs: Mapping[str, Config], height: int, width: int) -> tuple[int, ...]:
        """Shape of one x_0 for an image of height x width pixels.

        Raises:
            UserError: a side that the model cannot take.
        """
        raise NotImplementedError

    # The process.

    @abstractmethod
    def prediction(self, scheduler: Mapping[str, Any], source: str = "") -> Prediction:
        """What networks with this configuration of a scheduler predict."""

    @abstractmethod
    def noise_schedule(self, scheduler: Mapping[str, Any]) -> NoiseSchedule:
        """Their noise schedule."""

    @abstractmethod
    def predicting(self, scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
        """A scheduler's configuration for another prediction."""

    @abstractmethod
    def ending_in_noise(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's configuration whose last step is pure noise."""

    # What is asked of a loaded model.

    def prepare(self, model: LoadedModel) -> None:  # noqa: B027
        """Set a model that was just put together as it is used."""

    def load_tokenizer(self, path: Path, name: str) -> Any:
        """A tokenizer of a base by its folder's name."""
        raise NotImplementedError

    def write_tokenizer(self, folder: Path, name: str) -> None:
        """Write a tokenizer into its folder."""
        raise NotImplementedError

    def encode_images(self, model: LoadedModel, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels in [-1, 1] (B, 3, H, W) as what is cached: the VAE's mean and log-variance."""
        raise TypeError(f"{self.title} works on pixels and has no VAE")

    @abstractmethod
    def x_0(self, model: LoadedModel, batch: dict[str, Any], noise: Tensor | None) -> Tensor:
        """x_0 of a batch; `noise` (like x_0) draws from the VAE's posterior, None takes its mean."""

    def text_parts(self, model: LoadedModel) -> dict[str, tuple[Any, Any]]:
        """Each text encoder's tokenizer and itself, by name, where they take new tokens."""
        return {}

    @abstractmethod
    def encode_prompts(self, model: LoadedModel, captions: Sequence[str]) -> Condition:
        """What the network is conditioned on for each caption.

        Captions of unequal length are padded at the end of dimension 1, and a tensor `..._mask` (B, L) is true where
        there is no padding.
        """

    def conditioned(self, condition: Condition, batch: Mapping[str, Any]) -> Condition:
        """A condition with what else of a batch the network is conditioned on."""
        return condition

    def text_settings(self, model: LoadedModel) -> str:
        """What decides beside the weights what captions are encoded as: a part of the text cache's keys."""
        return self.name

    def words(self, model: LoadedModel, caption: str) -> list[tuple[str, list[int]]]:
        """Words of a caption and the places of their tokens in cross-attention; none where it cannot be traced."""
        return []

    @abstractmethod
    def denoise(self, model: LoadedModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's prediction for x_t at times t (B,) of its noise schedule; same shape as x_t."""

    @abstractmethod
    def decode(self, model: LoadedModel, x_0: Tensor) -> Tensor:
        """x_0 as pixels in about [-1, 1], (B, 3, H, W)."""

    def start_sampling(self, scheduler: Any, steps: int, shape: Sequence[int], device: Any) -> None:
        """Give a sampler its steps, for x_0 of a shape."""
        scheduler.set_timesteps(steps, device=device)


class Architecture(ABC):
    """A model with new weights, by its sizes; a recipe names one with `class_path`."""

    @abstractmethod
    def build(self) -> Any:
        """The `model.Model`, with weights by torch's own generator."""


@cache
def _texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.json"))}


def _read(folder: Path) -> Configs:
    return {name: json.loads(text) for name, text in _texts(folder).items()}
