"""The command line as people meet it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loratune.cli import main as command
from loratune.cli.main import find, main, names
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.lora import LoRALayer

VERBS = [name for name in names() if name not in ("fit", "validate", "test")]
NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


def test_help_imports_nothing_heavy_and_names_every_verb() -> None:
    code = (
        "import sys; from loratune.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"loratune {verb} " in done.stdout for verb in names())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = [name for name in find(verb).__annotations__ if name not in ("return", "overrides")]
    assert all(f"--{name.replace('_', '-')} " in text or f"\n  {name} " in text for name in options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "no such verb; did you mean fit?"),
        (["sample", "--base", "x"], "nothing to draw"),
        (["sample", "--base", "builtin:nothing", "--prompt", "a"], "builtin:nothing: there is no such embedded base"),
        (["sample", "--base", "x.ckpt", "--prompt", "a"], "x.ckpt: a pickle can run any code"),
        (["sample", "--base", "nowhere.safetensors", "--prompt", "a"], "nowhere.safetensors: no such file"),
        (["sample", "--bse", "x"], "bse"),
        (["sample", "--base", "x", "--prompts", "missing.txt"], "missing.txt: No such file"),
        (["inspect", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("loratune: ")
    assert error.count("\n") == 1


def test_inspect_says_what_a_lora_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    layer = LoRALayer(torch.randn(4, 16), torch.randn(8, 4), 2.0)
    path = tmp_path / "x.safetensors"
    write_lora(path, LoRAFile({NAME: layer}, {"loratune.base": "builtin:somewhere"}))
    assert main(["inspect", str(path), "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == [4]
    assert found["alpha"] == [2.0]
    assert found["layers"] == 1
    assert found["base"] == "builtin:somewhere"
    wanted = float((0.5 * layer.up @ layer.down).norm())
    assert found["norm of (alpha/r) B A"] == {"down.0": pytest.approx(wanted, rel=1e-5)}


def test_inspect_says_what_a_checkpoint_is(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_base / "unet" / "diffusion_pytorch_model.safetensors"
    assert main(["inspect", str(file)]) == 0
    assert "F32" in capsys.readouterr().out


def test_flags_with_dashes_and_without_a_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verb(lora: list[str], in_place: bool = False, batch_size: int = 1) -> None:
        """Say what was given."""
        print(lora, in_place, batch_size)

    monkeypatch.setattr(command, "find", lambda name: verb)
    for words, told in (
        (["--lora", "a", "--in-place", "--lora=b", "--batch-size", "3"], "['a', 'b'] True 3"),
        (["--in_place", "true", "--lora", "a"], "['a'] True 1"),
        (["--in-place=false", "--lora", "a:-0.5"], "['a:-0.5'] False 1"),
    ):
        assert main(["verb", *words]) == 0
        assert capsys.readouterr().out == f"{told}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "x.safetensors"],
        ["inspect", "x.safetensors", "--diff", "x.safetensors"],
        ["convert", "x.safetensors", "--to", "peft", "--out", "o.safetensors"],
        ["convert", "x.safetensors", "--to", "other", "--out", "o.safetensors"],
        ["convert", "--to", "peft", "--out", "o.safetensors"],
        ["combine", "--lora", "x.safetensors", "--out", "o.safetensors"],
        ["resize", "x.safetensors", "--rank", "2", "--out", "o.safetensors"],
        ["resize", "x.safetensors", "--rank", "two", "--out", "o.safetensors"],
        ["extract", "--base", "x.safetensors", "--tuned", "x.safetensors", "--rank", "2", "--out", "o.safetensors"],
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a pickle", b"\xff" * 40, bytes(7) + b"\x10{}"])
def test_every_tool_refuses_bad_files_in_one_line_and_writes_nothing(
    words: list[str], content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.safetensors").write_bytes(content)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("loratune: ")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"x.safetensors"}


def test_sample_draws_prompts_and_a_grid(tiny_base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n\n../../etc/passwd\n")
    words = ["sample", "--base", str(tiny_base), "--prompt", "one", "--prompt=two", "--prompts", str(prompts)]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-one-0.png", "001-two-0.png", "002-a-red-disc-0.png", "003-etc-passwd-0.png", "grid.png"]
    assert Image.open(tmp_path / "out" / "000-one-0.png").size == (16, 16)


def test_the_same_seed_gives_the_same_image_whatever_else_is_drawn(tiny_base: Path, tmp_path: Path) -> None:
    words = ["sample", "--base", str(tiny_base), "--steps", "3", "--seed", "5"]
    assert main([*words, "--prompt", "a red disc", "--out", str(tmp_path / "alone")]) == 0
    assert main([*words, "--prompt", "other", "--prompt", "a red disc", "--out", str(tmp_path / "both")]) == 0
    alone = (tmp_path / "alone" / "000-a-red-disc-5.png").read_bytes()
    assert alone == (tmp_path / "both" / "001-a-red-disc-5.png").read_bytes()
    assert alone != (tmp_path / "both" / "000-other-5.png").read_bytes()


def test_help_shows_options_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: loratune merge --base BASE --lora LORA --out OUT [options]")
    assert "  --in-place  " in text
    assert "  --lora LORA" in text
    assert "true,false" not in text
    assert "type:" not in text
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "(default: 0)" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_alone_runs_or_says_what_it_lacks(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    alone = functools.wraps(find(verb))(lambda *words, **given: ran.append((words, given)))
    monkeypatch.setattr(command, "find", lambda name: alone)
    code = main([verb])
    assert (code == 0 and ran) or (code == 2 and "required" in capsys.readouterr().err)
    assert (verb == "quickstart") == (code == 0)


def test_what_is_drawn_with_captions_is_a_folder_to_train_on(tiny_base: Path, tmp_path: Path) -> None:
    from loratune.data.sources import read_source

    words = ["sample", "--base", str(tiny_base), "--steps", "1", "--captions", "--out", str(tmp_path / "class")]
    assert main([*words, "--prompt", "a woman", "--count", "3"]) == 0
    assert [one.caption for one in read_source(str(tmp_path / "class"))] == ["a woman"] * 3
