"""What a base is, read from its header or its folder's configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.errors import UserError
from loratune.families.architectures import architectures, file_shapes
from loratune.families.base import Base
from loratune.families.base_configs import CONFIGS_KEY, folder_configs, read_json
from loratune.families.known import family_of, pipelines
from loratune.families.sdxl import StableDiffusionXL
from loratune.formats.files import write_safetensors
from loratune.formats.headers import Header, TensorInfo, header_bytes

Tiny = Callable[..., dict[str, dict[str, Any]]]


def sparse_checkpoint(
    path: Path, name: str, metadata: dict[str, str] | None = None, marks: tuple[str, ...] = ()
) -> Path:
    """A file of full size whose data is a hole: it has a header and takes no room."""
    infos, end = [(mark, TensorInfo("F16", (0,), 0, 0)) for mark in marks], 0
    for key, shape in file_shapes(architectures()[name]).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        infos.append((key, TensorInfo("F16", shape, start, end)))
    head = header_bytes(infos, metadata or {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + end)
    return path


@pytest.mark.parametrize("name", architectures())
def test_a_single_file_is_told_by_its_header(name: str, tmp_path: Path) -> None:
    configs = Base.open(str(sparse_checkpoint(tmp_path / "x.safetensors", name))).configs
    assert {**configs, "model_index": None} == {**architectures()[name], "model_index": None}
    family = family_of(configs)
    assert (family.variant(configs) == "inpainting") == name.endswith("inpainting")
    assert configs["model_index"]["_class_name"] == family.pipeline_of(configs)
    parts = {part.name for part in pipelines()[family.pipeline_of(configs)].parts}
    assert parts == architectures()[name].keys() - {"scheduler"}


@pytest.mark.parametrize(
    ("metadata", "marks", "told"),
    [
        ({}, (), {}),
        ({"modelspec.prediction_type": "v"}, (), {"prediction_type": "v_prediction"}),
        ({"modelspec.prediction_type": "V_prediction"}, (), {"prediction_type": "v_prediction"}),
        ({"modelspec.prediction_type": "epsilon"}, (), {"prediction_type": "epsilon"}),
        ({"modelspec.prediction_type": "something"}, (), {}),
        ({"modelspec.prediction_type": "epsilon"}, ("v_pred",), {"prediction_type": "v_prediction"}),
        (
            {},
            ("v_pred", "ztsnr"),
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_the_schedule_that_a_single_file_tells(
    metadata: dict[str, str], marks: tuple[str, ...], told: dict[str, Any], tmp_path: Path
) -> None:
    header = Header(metadata, dict.fromkeys(marks, TensorInfo("F16", (0,), 0, 0)), 0, 0)
    assert StableDiffusionXL().stated(header) == told
    configs = Base.open(str(sparse_checkpoint(tmp_path / "x.safetensors", "sdxl", metadata, marks))).configs
    assert configs["scheduler"] == architectures()["sdxl"]["scheduler"] | told


def test_a_file_that_carries_its_configurations(tiny_configs: Tiny, tmp_path: Path) -> None:
    configs = tiny_configs("sd2")
    write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {CONFIGS_KEY: json.dumps(configs)})
    assert Base.open(str(tmp_path / "x.safetensors")).configs == configs


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"unet": 1}', '{"unet": {}, "vae": {}, "text_encoder": {}}'])
def test_configurations_that_are_damaged_are_told(text: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {CONFIGS_KEY: text})
    with pytest.raises(UserError, match=r"x\.safetensors: its metadata loratune\.configs is damaged"):
        _ = Base.open(str(tmp_path / "x.safetensors")).configs


def test_what_is_no_base_is_told_in_one_line(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"joint_blocks.0.x": torch.ones(1)}, {})
    write_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(1)}, {})
    for name, words in (("a", "a Stable Diffusion 3 checkpoint"), ("b", "not a checkpoint that is known here")):
        families = "Stable Diffusion 1.x, Stable Diffusion 2.x, Stable Diffusion XL"
        wanted = f"{name}.safetensors: {words}; a base must be of {families}"
        with pytest.raises(UserError, match=wanted) as error:
            _ = Base.open(str(tmp_path / f"{name}.safetensors")).configs
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "3", "[1]"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_folder_of_another_pipeline_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="it is for FluxPipeline, which is not supported"):
        folder_configs(tmp_path)
