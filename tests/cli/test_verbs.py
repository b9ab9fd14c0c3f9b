"""A verb is a file: its signature is its command line; and every mistake, with every verb, is one line."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from loratune.cli import failures, verbs
from loratune.cli import main as command
from loratune.cli.main import find, main, names
from loratune.cli.parser import arguments, is_of_a_recipe

FOLDER = Path(verbs.__path__[0])
HEAVY = {"torch", "numpy", "lightning", "diffusers", "transformers", "safetensors", "PIL", "datasets", "yaml"}


@pytest.fixture(autouse=True)
def nothing_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", names())
def test_a_verb_is_one_public_function_of_its_file(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    heavy = {"torch", "lightning", "rich"} | {f"loratune.{room}" for room in ("lora", "training", "families", "recipe")}
    for node in tree.body:
        imported = getattr(node, "module", None) or ""
        assert not any(imported == each or imported.startswith(f"{each}.") for each in heavy), imported
    verb = find(name)
    assert verb.__module__ == f"loratune.cli.verbs.{name}"
    doc = inspect.getdoc(verb) or ""
    assert doc.splitlines()[0].endswith((".", ":"))
    for parameter in inspect.signature(verb).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.name == "overrides" or f"    {parameter.name}: " in doc, "the docstring is the help"


def test_every_file_of_the_folder_is_a_verb() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*names(), "__init__"}
    assert {"sample", "merge", "inspect", "fit", "plan", "quickstart"} <= set(names())


VALUES = {int: "3", float: "0.5", str: "text", Path: "a/b", bool: "true"}


def typed(kind: Any) -> tuple[str, Any]:
    """A word for a parameter's type, and the value that it has to become."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is list:
        word, value = typed(kinds[0])
        return word, [value]
    if origin is Literal:
        return kinds[-1], kinds[-1]
    if kinds:
        return typed(kinds[0])  # or None
    return VALUES[kind], True if kind is bool else kind(VALUES[kind])


@pytest.mark.parametrize("name", names())
def test_the_signature_is_the_command_line(name: str) -> None:
    verb, given = find(name), {}
    kinds = get_type_hints(verb)
    signature = inspect.signature(verb)
    words: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        word, given[parameter.name] = typed(kinds[parameter.name])
        flag = [] if parameter.kind is parameter.POSITIONAL_ONLY else [f"--{parameter.name.replace('_', '-')}"]
        words += [*flag, word]
    keys = ["--data.seed", "3", "--allow-code"] if is_of_a_recipe(verb) else []
    places, options = arguments(verb, [*words, *keys])
    received = signature.bind(*places, **options).arguments
    assert {key: value for key, value in received.items() if key not in ("overrides", "words")} == given
    assert list(received.get("overrides", received.get("words", ()))) == keys


def test_help_imports_nothing_heavy_for_verbs_without_a_recipe() -> None:
    verbs_of_files = [name for name in names() if name not in ("fit", "validate", "test")]
    code = (
        "import sys; from loratune.cli.main import main\n"
        f"for words in [['--help'], *([name, '--help'] for name in {verbs_of_files!r})]:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        f"    heavy = {HEAVY - {'yaml'}!r} & set(sys.modules)\n"
        "    assert not heavy, f'{words} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WORDS = {
    "inspect": ["inspect", "FILE"],
    "convert": ["convert", "FILE", "--to", "peft", "--out", "o.safetensors"],
    "resize": ["resize", "FILE", "--rank", "2", "--out", "o.safetensors"],
    "combine": ["combine", "--lora", "FILE", "--out", "o.safetensors"],
    "merge": ["merge", "--base", "FILE", "--lora", "l.safetensors", "--out", "o.safetensors"],
    "extract": ["extract", "--base", "FILE", "--tuned", "FILE", "--rank", "2", "--out", "o.safetensors"],
    "sample": ["sample", "--base", "FILE", "--prompt", "x"],
    "measure": ["measure", "--base", "builtin:emoji-64", "--what", "vae", "--data", "FILE"],
    "fit": ["fit", "-c", "FILE"],
    "validate": ["validate", "-c", "FILE"],
    "test": ["test", "-c", "FILE"],
    "data": ["data", "FILE"],
    "cache": ["cache", "FILE"],
    "plan": ["plan", "FILE"],
    "quickstart": ["quickstart", "--recipe", "FILE"],
}
RECIPES = [name for name in WORDS if name in names() and is_of_a_recipe(find(name))]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with; nothing else is said, and nothing is left."""
    before = set(Path.cwd().rglob("*"))
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("loratune: ")
    assert said.err.count("\n") == 1
    assert not said.out
    assert said.err[:-1].isprintable()
    assert set(Path.cwd().rglob("*")) == before
    return said.err


def test_every_verb_is_tried() -> None:
    assert set(WORDS) == set(names())


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "control"])
def test_a_file_that_is_none_is_one_line(name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    ending = "yaml" if name in RECIPES else "safetensors"
    file = f"a\x1b]0;x\x07\u202e.{ending}" if what == "control" else f"nowhere.{ending}"
    if what == "folder":
        Path(file).mkdir()
    if what == "pipe":
        os.mkfifo(file)
    said = refusal([file if word == "FILE" else word for word in WORDS[name]], capsys)
    assert "nowhere" in said or what == "control"
    if what == "control":
        assert "\\x1b]0;x\\x07\\u202e" in said


MISTAKES = {
    "model:\n  base: [unclosed\n": ":3: not valid YAML",
    "model: {base: x}\n\tdata: 1\n": ":2: not valid YAML",
    "data: {path: a}\nmodel: {base: x}\ndata: {path: b}\n": ":3: 'data' stands twice, first in line 1",
    "model:\n  base: x\ndata:\n": ":3: 'data' is empty",
    "seed_everything: 2024-99-99\n": ":1: 'seed_everything': month must be in 1..12",
    "'\x1b[31mkey': {\n".replace("\x1b", "\\x1b"): "not valid YAML",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_in_yaml_is_one_line(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(text)
    said = refusal(["r.yaml" if word == "FILE" else word for word in WORDS[name]], capsys)
    assert f"r.yaml{MISTAKES[text]}" in said or MISTAKES[text] in said


@pytest.mark.parametrize("name", WORDS)
def test_an_unknown_option_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("model: {base: 'builtin:emoji-64'}\ndata: {path: images}\n")
    Path("images-heldout").mkdir()
    Path("noto-heldout").mkdir()
    key = "--data.resolutoin" if name in RECIPES else "--bsae\x1b"
    said = refusal(["r.yaml" if word == "FILE" else word for word in WORDS[name]] + [key, "3"], capsys)
    assert ("did you mean 'data.resolution'" in said) == (name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_an_unknown_key_and_foreign_code_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("images-heldout").mkdir()
    Path("noto-heldout").mkdir()
    words = ["r.yaml" if word == "FILE" else word for word in WORDS[name]]
    data = "data: {path: images}\n"
    Path("r.yaml").write_text(f"trainer:\n  '\\e[31mmax': 1\n{data}".replace("'", '"'))
    assert "r.yaml:2: unknown key 'trainer.\\x1b[31mmax'" in refusal(words, capsys)
    Path("r.yaml").write_text(f"trainer:\n  callbacks: [{{class_path: evil.Thing}}]\n{data}")
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    said = refusal(words, capsys)
    assert "r.yaml:2: 'evil.Thing' is code from outside the classes that recipes may name; give --allow-code" in said


class Failing:
    """A verb that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, name: str) -> Any:
        def fit(*words: str) -> None:
            """Fail."""
            raise self.error

        return fit


ERRORS: list[tuple[BaseException, int, str]] = [
    (FileNotFoundError(2, "No such file or directory", "a\x1b.png"), 2, "a\\x1b.png: No such file or directory"),
    (PermissionError(13, "Permission denied", b"a.png"), 2, "a.png: Permission denied"),
    (OSError(28, "No space left on device"), 2, "a file: No space left on device"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "fit: out of memory; lower data.batch_size"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes."),
        2,
        "fit: out of memory (tried to allocate 123 bytes); lower data.batch_size",
    ),
    (
        RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23 GiB"),
        2,
        "fit: out of memory (tried to allocate 2.50 GiB); lower data.batch_size",
    ),
]


@pytest.mark.parametrize(("error", "code", "words"), ERRORS)
def test_what_ends_a_verb_is_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find", Failing(error))
    assert main(["fit"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"loratune: {words}")
    assert said.count("\n") == 1


def test_the_last_resort_is_a_line_and_a_file_with_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "find", Failing(RuntimeError("a shape\nof two lines \x1b[31m \udc83")))
    assert main(["fit"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("loratune: unexpected RuntimeError: a shape of two lines \\x1b[31m \\udc83; ")
    assert said.count("\n") == 1
    (file,) = tmp_path.glob("loratune-*.txt")
    assert str(file) in said
    assert "raise self.error" in file.read_text()


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"]])
def test_a_reader_that_goes_away_is_no_traceback(words: list[str]) -> None:
    code = f"import sys; from loratune.cli.main import main\nprint('x' * 100_000)\nsys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() in (0, 1, 141)
    assert "main" not in said, said
