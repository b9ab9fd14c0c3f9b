"""What a layer is, and where its tensors lie in the original single file; shared by U-Net, VAE and text encoders.

Names are diffusers' and transformers' (`name`) and those of the original single file (`ldm`: latent-diffusion by
CompVis, and Stability's generative-models). Layers follow by rule from the configurations; no model is made, so the
names do not follow what a library's next version calls its modules. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import UserError

Config = Mapping[str, Any]
Shape = tuple[int, ...]

# The parts of a residual block: here, in the U-Net's original and in the VAE's.
RESNET = {
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "time_emb_proj": ("emb_layers.1", ""),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "conv_shortcut": ("skip_connection", "nin_shortcut"),
}


@dataclass(frozen=True)
class Place:
    """Where a component's tensor lies in the single file.

    Args:
        key: the file's tensor.
        shape: of the file's tensor.
        rows: the part of the file's tensor that it is, [start, stop) of the first dimension; None for all of it
            (OpenCLIP keeps q, k and v in one).
        transposed: whether the file has it with rows and columns changed.
    """

    key: str
    shape: Shape
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Layer:
    """A module with a weight.

    Args:
        name: as diffusers or transformers have it, without the component.
        ldm: as the single file has it, without the component's prefix.
        shape: of the weight in the module.
        bias: whether there is one; its length is the weight's first.
        file_shape: of the weight in the single file, where it is another (1x1 convolutions
            in the VAE's attention).
        table: whether the weight is looked up in, not multiplied with (embeddings).
        suffixes: of weight and bias in the single file.
        third: which third of the file's rows it is (0, 1, 2 for q, k, v in one tensor); None for all of them.
        transposed: whether the file has the weight with rows and columns changed.
    """

    name: str
    ldm: str
    shape: Shape
    bias: bool = True
    file_shape: Shape = ()
    table: bool = False
    suffixes: tuple[str, str] = (".weight", ".bias")
    third: int | None = None
    transposed: bool = False

    @property
    def adaptable(self) -> bool:
        """Whether a LoRA can sit here: W_0 is a matrix or a convolution."""
        return len(self.shape) in (2, 4) and not self.table

    def tensors(self) -> Iterator[tuple[str, Shape, Place]]:
        """Its parameters: name, shape in the module, place in the single file (without the component's prefix)."""
        yield f"{self.name}.weight", self.shape, self._place(self.suffixes[0], self.file_shape or self.shape)
        if self.bias:
            yield f"{self.name}.bias", self.shape[:1], self._place(self.suffixes[1], self.shape[:1])

    def _place(self, suffix: str, shape: Shape) -> Place:
        if self.third is not None:
            rows = (self.third * shape[0], (self.third + 1) * shape[0])
            return Place(self.ldm + suffix, (3 * shape[0], *shape[1:]), rows)
        turned = self.transposed and len(shape) == 2
        return Place(self.ldm + suffix, shape[::-1] if turned else shape, transposed=turned)


def get(config: Config, component: str, key: str) -> Any:
    """A value that a configuration must have.

    Raises:
        UserError: it has not.
    """
    if config.get(key) is None:
        raise UserError(f"{component} configuration: {key} is missing; give the whole config.json")
    return config[key]


def refuse_other(config: Config, component: str, known: Mapping[str, tuple[Any, ...]]) -> None:
    """Check that a configuration has only values that are known; the first of each is what a missing key means.

    Raises:
        UserError: it has another one.
    """
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            allowed = " and ".join(repr(value) for value in values)
            raise UserError(f"{component} configuration: {key} is {config[key]!r}; only {allowed} is known here")


def refuse_blocks(component: str, kinds: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Check a configuration's types of blocks.

    Raises:
        UserError: one of them is not known.
    """
    if wrong := [kind for kind in kinds if kind not in known]:
        raise UserError(f"{component} configuration: the block type {wrong[0]!r} is not known; known are {known}")


def resnet(name: str, ldm: str, inner: int, outer: int, time: int | None) -> Iterator[Layer]:
    """A residual block from `inner` to `outer` channels; `time`: width of the time embedding (the VAE has none)."""
    shapes: dict[str, Shape] = {"norm1": (inner,), "conv1": (outer, inner, 3, 3)}
    if time is not None:
        shapes["time_emb_proj"] = (outer, time)
    shapes |= {"norm2": (outer,), "conv2": (outer, outer, 3, 3)}
    if inner != outer:
        shapes["conv_shortcut"] = (outer, inner, 1, 1)
    for part, shape in shapes.items():
        yield Layer(f"{name}.{part}", f"{ldm}.{RESNET[part][time is None]}", shape)
