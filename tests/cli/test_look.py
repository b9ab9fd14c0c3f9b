"""`loratune data` looks and writes nothing; `loratune cache` encodes and can be killed; strict runs stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loratune.cli.main import main
from loratune.cli.parser import overridden


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_data_tells_and_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "01.png").write_bytes((tmp_path / "images" / "00.png").read_bytes())
    before = files(tmp_path)
    assert main(["data", str(recipe)]) == 1
    said = capsys.readouterr().out
    assert "(training): 12 images, " in said
    assert "To mend: duplicate images." in said
    assert files(tmp_path) == before
    assert main(["data", str(recipe), "--json", str(tmp_path / "a.json"), "--data.validation_percent=0"]) == 1
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["sources"][0]["held_out"] == 0
    assert told["buckets"] == {"16x16": 12}
    assert told["findings"][0]["names"]
    assert main(["data", str(recipe), "--data.resolutoin", "3"]) == 2
    assert "did you mean 'data.resolution'" in capsys.readouterr().err


def test_data_has_nothing_to_mend(recipe: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (images / "metadata.jsonl").read_text().splitlines()
    for number in range(12):
        if number not in (0, 1):
            (images / f"{number:02d}.png").unlink()
    (images / "metadata.jsonl").write_text("\n".join(lines[:2]))
    assert main(["data", str(recipe)]) == 0
    assert capsys.readouterr().out.endswith("Nothing to mend.\n")


FAULTS = {
    "unreadable": "1 unreadable images: ",
    "cut": "1 captions truncated at 75 tokens: 03.png (",
    "no_caption": "1 images without a caption: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_strict_run_stops_before_weights_are_read(
    recipe: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    from loratune.training import diffusion_module

    loaded: list[str] = []
    monkeypatch.setattr(diffusion_module, "load_model", lambda *_: loaded.append("weights") or 1 / 0)
    if fault == "unreadable":
        (images / "03.png").write_bytes(b"nothing")
    else:
        text = (images / "metadata.jsonl").read_text()
        told = "word " * 90 if fault == "cut" else ""
        (images / "metadata.jsonl").write_text(text.replace("a black disc 3", told))
    assert main(["fit", "-c", str(recipe), "--data.strict", "true"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"data.strict: {FAULTS[fault]}" in said
    assert "03.png" in said
    assert not loaded
    assert not (tmp_path / "run").exists()


def test_a_killed_cache_goes_on_where_it_was(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = (
        "import sys, time\n"
        "from loratune.data.encode import Encoder\n"
        "prepare = Encoder.prepare\n"
        "def waiting(self, *given):\n"
        "    prepare(self, *given)\n"
        "    time.sleep(0.2)\n"
        "Encoder.prepare = waiting\n"
        "from loratune.cli.main import main\n"
        f"main(['cache', {str(recipe)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env=os.environ, stdout=subprocess.DEVNULL)
    held = tmp_path / "cache"
    deadline = time.monotonic() + 120
    while len(list(held.rglob("*.safetensors"))) < 9 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(held.rglob("*.safetensors")))
    assert 9 <= there < 24  # twelve images and twelve captions
    before = files(tmp_path)
    assert main(["cache", str(recipe)]) == 0
    said = capsys.readouterr().out
    new = int(said.split(" encoded now")[0].split()[-1])
    assert 12 - (there + 1) // 2 <= new <= 12 - there // 2
    assert len(list(held.rglob("*.safetensors"))) == 24
    assert all(path.is_relative_to(held) for path in files(tmp_path) - before)
    assert main(["cache", str(recipe), "--data.num_workers", "2"]) == 0
    assert "12 images: 0 encoded now, 12 were there, 0 unreadable" in capsys.readouterr().out


def test_what_is_never_cached_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", str(recipe), "--data.cache_latents", "false"]) == 2
    assert "nothing of it is cached" in capsys.readouterr().err


def test_keys_of_recipes_are_told_from_options() -> None:
    words = [
        "r.yaml",
        "--data.resolution",
        "3",
        "--json",
        "a.json",
        "--model.lora.rank=4",
        "--run",
        "--seed_everything",
        "1",
    ]
    assert overridden(words) == (
        ["r.yaml", "--json", "a.json", "--run"],
        ["--data.resolution", "3", "--model.lora.rank=4", "--seed_everything", "1"],
    )
