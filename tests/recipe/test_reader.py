"""A recipe's YAML, as strangers and tired people write it: bounded, and each mistake with its line."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml

from loratune.errors import UserError
from loratune.recipe.reader import read_recipe


def bomb(width: int, depth: int) -> str:
    lines = [f"a0: &a0 [{','.join(['lol'] * width)}]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join([*lines, "model: {base: x}"])


WRONG = {
    "model:\n  base: [unclosed\n": ":3: not valid YAML",
    "model: {base: x}\n\tdata: 1\n": ":2: not valid YAML (found character '\\t'",
    "": "a recipe has sections such as trainer:",
    "{}": "a recipe has sections such as trainer:",
    "- a": "a recipe has sections such as trainer:",
    "words": "a recipe has sections such as trainer:",
    "trainer: {}\nseed_everything: 2024-99-99\n": ":2: 'seed_everything': month must be in 1..12",
    "a:\n  b: [1, !!int x]": ":2: 'a.b': invalid literal",
    "a: " + "9" * 5000: ":1: 'a': Exceeds the limit",
    "a: " + "[" * 20000 + "]" * 20000: ":1: is nested more than 50 deep",
    "a: " + "{b: " * 60 + "}" * 60: ":1: is nested more than 50 deep",
    "model: &x\n  base: *x\n": ":2: *x stands within itself",
    "data:\n  path: a\nmodel: {}\ndata:\n  path: b\n": ":4: 'data' stands twice, first in line 1",
    "model:\n  lora:\n    rank: 1\n    alpha: 2\n    rank: 3\n": ":5: 'rank' stands twice, first in line 3",
    "a: [{b: 1, b: 2}]": ":1: 'b' stands twice",
    "model: {base: x}\ndata:\n": ":2: 'data' is empty; give it keys",
    "model: ~": ":1: 'model' is empty",
    "? [a, b]\n: 1\n": ":1: a key is seq; write a name",
    "a: 1\n---\nb: 2\n": ":2: not valid YAML",
    "a: !!python/object/apply:os.system [x]": ":1: not valid YAML (could not determine a constructor",
    "a: *nowhere": ":1: not valid YAML (found undefined alias",
    "a\0: 1": "not valid YAML",
    "a: {<<: 3}": ":1: not valid YAML",
    bomb(9, 12): "its aliases written out",
    bomb(2, 40): "its aliases written out",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_told_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(UserError) as refusal:
        read_recipe(path)
    assert str(refusal.value).startswith(f"{path}:")
    assert WRONG[text] in str(refusal.value)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("content", [b"\xff\xfea\0", b"a: \xe9", b"\x89PNG\r\n", b"a" * (1 << 21)])
def test_what_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.yaml: (not a text file|has more than)"):
        read_recipe(tmp_path / "r.yaml")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file.*such as recipes/quickstart\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_recipe(tmp_path)


def test_what_yaml_can_do_is_read(tmp_path: Path) -> None:
    text = "\ufeffbase: &b {lr: 1, n: 2}\r\nmodel:\r\n  <<: *b\r\n  n: 3\r\ndata: {path: 'ü'}\r\nckpt_path: null\r\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8", newline="")
    tree = read_recipe(tmp_path / "r.yaml")
    assert tree["model"] == {"lr": 1, "n": 3}
    assert tree["data"] == {"path": "ü"}
    assert tree["ckpt_path"] is None


def test_damaged_recipes_are_read_or_refused_and_never_else(tmp_path: Path) -> None:
    chance, text = random.Random(0), (Path(__file__).parent.parent.parent / "recipes" / "character.yaml").read_text()
    pieces = [
        "\t",
        ": ",
        "[",
        "}",
        "&a ",
        "*a",
        "!!",
        "'",
        '"',
        "\n",
        "- ",
        "? ",
        "<<: ",
        "|",
        "\0",
        "ü",
        "#",
        "%",
        "@",
    ]
    refused = 0
    for _ in range(400):
        letters = list(text)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(letters))
            letters[place : place + chance.randrange(3)] = chance.choice(pieces)
        (tmp_path / "r.yaml").write_text("".join(letters))
        try:
            tree = read_recipe(tmp_path / "r.yaml")
        except UserError:
            refused += 1
        else:
            assert tree == yaml.safe_load("".join(letters))
    assert 50 < refused < 400
