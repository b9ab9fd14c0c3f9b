"""`loratune fit`."""

from __future__ import annotations


def fit(*words: str) -> None:
    """Train what a recipe says.

    Args:
        words: -c RECIPE, and keys that override the recipe's, such as --trainer.max_steps 10; --allow-code lets the
            recipe name classes of your own.
    """
    from loratune.recipe.run import run

    run(["fit", *words])
