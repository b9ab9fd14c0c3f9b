"""The checkpoints that benchmarks are run on are what real files are."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.families import architectures as known
from loratune.families.architectures import architectures, detect
from loratune.families.base import Base
from loratune.formats.files import read_tensors
from loratune.formats.headers import Header

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def full_size() -> Any:
    spec = importlib.util.spec_from_file_location("full_size", HERE / "full_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_header_is_a_real_ones(name: str, full_size: Any) -> None:
    raw = json.loads(gzip.decompress((HERE.parent / "headers" / f"{name}.json.gz").read_bytes()))
    raw.pop("__metadata__", None)
    assert {key: [info.dtype, *info.shape] for key, info in full_size.file_infos(name, "F16")} == raw


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_told_by_its_file(name: str, full_size: Any) -> None:
    infos = full_size.file_infos(name, "BF16")
    assert detect(Header({}, dict(infos), 0, 0)) == name
    assert all(before[1].stop == after[1].start for before, after in pairwise(infos))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_files_and_folders_are_written_whole(
    dtype: str, full_size: Any, tiny_configs: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"sdxl": tiny_configs("sdxl")}
    monkeypatch.setattr(known, "_architectures", lambda: small)
    known._taken.cache_clear()
    try:
        full_size.make_checkpoint("sdxl", tmp_path / "x.safetensors", dtype)
        full_size.make_folder("sdxl", tmp_path / "folder", dtype)
        for weights in (Base.open(str(tmp_path / name)).weights() for name in ("x.safetensors", "folder")):
            assert len(weights) == 4
            values = torch.cat([value.float().flatten() for value in weights["unet"].values() if value.dim() > 1])
            assert values.isfinite().all()
            assert abs(values.mean()) < 0.01
            assert 0.02 < values.std() < 0.5
    finally:
        known._taken.cache_clear()
    tensors = read_tensors(tmp_path / "x.safetensors")
    norm = tensors["conditioner.embedders.1.model.ln_final.weight"].float()
    assert 0.8 < norm.mean() < 1.2
    one, other = (tensors[f"model.diffusion_model.middle_block.{n}.in_layers.2.weight"] for n in (0, 2))
    assert not torch.equal(one, other)
