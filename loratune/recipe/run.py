"""A recipe and the words of a command line, to what they build and run; mistakes in YAML are told at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import UserError
from loratune.recipe.mistakes import entries_of
from loratune.recipe.reader import read_recipe

if TYPE_CHECKING:
    from loratune.recipe.parse import RecipeCLI

ALLOW_CODE = "--allow-code"


def recipes_in(argv: Sequence[str]) -> list[Path]:
    """The recipe files named on a command line."""
    following = zip(argv, [*argv[1:], ""], strict=True)
    named = [value for flag, value in following if flag in ("-c", "--config")]
    joined = [word.partition("=")[2] for word in argv if word.startswith(("-c=", "--config="))]
    return [Path(path) for path in (*named, *joined)]


def model_is_named(trees: Sequence[dict[str, Any]], argv: Sequence[str] = ()) -> bool:
    """Whether a recipe names its module (`model.class_path`); without a name it is a LoRA."""
    if any(word.startswith(("--model.class_path", "--model=")) or word == "--model" for word in argv):
        return True
    models = (tree.get("model") for tree in trees)
    return any(isinstance(model, dict) and "class_path" in model for model in models)


def run(argv: Sequence[str], execute: bool = True) -> RecipeCLI:
    """Parse a recipe, build its objects and run the sub-command that argv begins with.

    Args:
        argv: such as ["fit", "-c", "recipes/quickstart.yaml"]; with --allow-code, class paths may name any code.
        execute: False only builds (and argv then has no sub-command).

    Raises:
        UserError: a mistake in the recipe, told in one line.
    """
    recipes = recipes_in(argv)
    trees = [read_recipe(path) for path in recipes]
    entries = entries_of(recipes)
    from loratune.recipe.parse import Source, build  # heavy

    words = [word for word in argv if word != ALLOW_CODE]
    source = Source(entries, model_is_named(trees, argv), ALLOW_CODE in argv)
    try:
        return build(words, source, execute)
    except ValueError as error:
        place = recipes[-1] if recipes else argv[0]
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
