"""Train, sample, export and merge with every socket blocked."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from loratune.cli.main import main


def test_the_whole_path_needs_no_network(
    recipe: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 9))
    assert main(["fit", "-c", str(recipe), "--samples.every_n_steps", "3", "--samples.steps", "2"]) == 0
    lora, merged = tmp_path / "run" / "lora.safetensors", tmp_path / "merged.safetensors"
    assert main(["merge", "--base", str(tiny_base), "--lora", f"{lora}:0.8", "--out", str(merged)]) == 0
    words = ["sample", "--base", str(merged), "--prompt", "a red disc", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "grid.png").stat().st_size > 0
    assert main(["inspect", str(merged)]) == 0
