"""The command line: finds the verb, and turns every mistake into one line. Nothing heavy is imported before a verb."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules

from loratune import __version__
from loratune.cli import verbs
from loratune.cli.failures import report
from loratune.errors import UserError


def names() -> list[str]:
    """The verbs: one for each file in the folder `verbs`."""
    return sorted(module.name for module in iter_modules(verbs.__path__))


def find(name: str) -> Callable[..., int | None]:
    """The function of a verb, which its file calls by its own name.

    Raises:
        UserError: there is no such verb.
    """
    if name not in names():
        raise UserError(f"loratune {name}: no such verb{_nearest(name)}; loratune --help lists them")
    verb: Callable[..., int | None] = getattr(import_module(f"{verbs.__name__}.{name}"), name)
    return verb


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, names(), 1)
    return f"; did you mean {close[0]}?" if close else ""


def usage() -> str:
    """What `loratune --help` prints."""
    from loratune.cli.parser import is_of_a_recipe

    summaries = {name: (find(name).__doc__ or "").splitlines()[0] for name in names()}
    recipes = [name for name in summaries if is_of_a_recipe(find(name))]
    lines = [f"loratune {__version__}: teach a diffusion model a new style with LoRA", "", "With a recipe:"]
    lines += [f"  loratune {name:<11} {summaries[name]}" for name in recipes]
    lines += ["", "With files:"]
    lines += [f"  loratune {name:<11} {summaries[name]}" for name in summaries if name not in recipes]
    lines += ["", "loratune VERB --help explains every option; the README begins with `make demo`."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `loratune`; by default the process's own.

    Returns:
        The exit code: 0; 1 for what only a developer can mend, and where `data` found faults; 2 for what the user can
        mend; 130 after Ctrl-C; 141 where the reader of the output went away.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        return report(error, words)


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb = find(words[0])
    from loratune.cli.parser import arguments
    from loratune.cli.quiet import quiet

    quiet()
    places, options = arguments(verb, words[1:])
    return verb(*places, **options) or 0


if __name__ == "__main__":
    sys.exit(main())
