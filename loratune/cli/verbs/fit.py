"""`loratune fit`."""

from __future__ import annotations


def fit(*words: str) -> None:
    """Train what a recipe says.

    Args:
        words: -c RECIPE, and keys that override the recipe's, such as --trainer.max_steps 10.
    """
    from loratune.recipe.run import run

    run(["fit", *words])
