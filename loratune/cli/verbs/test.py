"""`loratune test`."""

from __future__ import annotations


def test(*words: str) -> None:
    """Compute the validation loss of a recipe's model, logged as a test.

    Args:
        words: -c RECIPE, and keys that override the recipe's, such as --ckpt_path last; --allow-code lets
            the recipe name classes of your own.
    """
    from loratune.recipe.run import run

    run(["test", *words])
