"""`loratune validate`."""

from __future__ import annotations


def validate(*words: str) -> None:
    """Compute the validation loss of a recipe's model.

    Args:
        words: -c RECIPE, and keys that override the recipe's, such as --ckpt_path last; --allow-code lets
            the recipe name classes of your own.
    """
    from loratune.recipe.run import run

    run(["validate", *words])
