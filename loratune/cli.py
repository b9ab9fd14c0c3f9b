"""The command line. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from loratune import __version__
from loratune.errors import UserError

RECIPE_VERBS = {
    "fit": "train what a recipe says",
    "validate": "the held-out loss of a recipe's model",
    "test": "the held-out loss of a recipe's model, as a test",
}


def sample(
    base: str,
    lora: list[str] = [],  # noqa: B006 (jsonargparse shows it as the default)
    prompt: list[str] = [],  # noqa: B006
    prompts: Path | None = None,
    out: Path = Path("samples"),
    steps: int = 25,
    guidance: float = 4.0,
    sampler: str = "ddim",
    seed: int = 0,
    count: int = 1,
    size: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
) -> None:
    """Draw pictures: a PNG for each prompt and seed, and a grid of them all.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, or FILE:WEIGHT; repeat it to add several.
        prompt: what to draw; repeat it for several pictures.
        prompts: a text file with one prompt a line.
        out: folder for the pictures.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 is none.
        sampler: ddim, ddpm, euler, euler-a, dpm++ or unipc.
        seed: of the first picture of each prompt; the same seed and prompt give the same picture.
        count: pictures for each prompt, from seed, seed + 1, and so on.
        size: side in pixels; by default the base's own.
        batch_size: pictures drawn at once; above 1 the last bits of a picture may depend on it.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from loratune.verbs import sample as run

    listed = [line.strip() for line in _read(prompts).splitlines() if line.strip()] if prompts else []
    if not prompt and not listed:
        raise UserError("sample: nothing to draw; give --prompt TEXT or --prompts FILE")
    run(base, lora, [*prompt, *listed], out, steps, guidance, sampler, seed, count, size, batch_size, device)


def merge(base: str, lora: list[str], out: Path) -> None:
    """Add LoRAs to a checkpoint: W' = W_0 + weight (alpha / r) B A.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, or FILE:WEIGHT; repeat it to add several.
        out: a .safetensors file (U-Net, text encoder and VAE in one), or a folder in diffusers' layout.
    """
    from loratune.verbs import merge as run

    run(base, lora, out)


def inspect(file: Path, json: bool = False) -> None:
    """Say what a .safetensors file is: family, rank, alpha, targets, size, norms, recipe and base.

    Args:
        file: a LoRA or a checkpoint.
        json: print JSON.
    """
    from loratune.verbs import inspect as run

    run(file, json)


def measure(
    base: str,
    what: Literal["vae", "nearest", "style"],
    data: str,
    lora: list[str] = [],  # noqa: B006
    style: str | None = None,
    samples: int = 200,
    size: int = 64,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Measure a base or a LoRA on real captioned pictures, and print JSON.

    vae: PSNR in dB of the VAE's reconstructions. nearest: how often the nearest of 20 random real
    pictures to a sample, by shape and by colour, is the one of its caption (chance is 5 %). style: how far
    a LoRA moves the mean colourfulness of samples from the base's to the style's, on the captions of `data`.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        what: vae, nearest or style.
        data: captioned pictures: a folder, a .parquet file or a hub name; for style, the base's drawings.
        lora: a LoRA file, or FILE:WEIGHT; repeat it to add several.
        style: for style: the style's own pictures of the captions of `data`.
        samples: how many pictures to measure.
        size: side in pixels.
        steps: of the sampler.
        guidance: scale of classifier-free guidance.
        seed: of the samples and of the choice of pictures.
        out: also write the JSON here.
    """
    from loratune.measure import measure as run

    run(base, what, data, lora, style, samples, size, steps, guidance, seed, out)


def quickstart(recipe: Path = Path("recipes/quickstart.yaml"), out: Path = Path("runs/quickstart")) -> None:
    """Train the quickstart's LoRA, merge it, draw before and after, and measure: what `make demo` runs.

    Args:
        recipe: what to train.
        out: folder of the run; an earlier one there is replaced.
    """
    from loratune.quickstart import quickstart as run

    run(recipe, out)


VERBS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "merge": merge,
    "inspect": inspect,
    "measure": measure,
    "quickstart": quickstart,
}
REPEATABLE = ("--lora", "--prompt")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def usage() -> str:
    """What `loratune --help` prints."""
    lines = [f"loratune {__version__}: teach a diffusion model a new style with LoRA", "", "With a recipe:"]
    lines += [f"  loratune {verb:<11} -c RECIPE [--KEY VALUE ...]   {text}" for verb, text in RECIPE_VERBS.items()]
    lines += ["", "With files:"]
    lines += [f"  loratune {name:<11} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    lines += ["", "loratune VERB --help explains every option; the README begins with `make demo`."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 for what the person can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    from loratune.quiet import quiet

    quiet()
    try:
        if words[0] in RECIPE_VERBS:
            from loratune.recipe import run

            run(words)
            return 0
        if words[0] in VERBS:
            return _run_verb(VERBS[words[0]], words[0], words[1:])
        raise UserError(f"loratune {words[0]}: no such verb{_nearest(words[0])}; loratune --help lists them")
    except UserError as error:
        print(f"loratune: {error}", file=sys.stderr)
        return 2


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    found = get_close_matches(word, [*RECIPE_VERBS, *VERBS], 1)
    return f"; did you mean {found[0]}?" if found else ""


def _run_verb(verb: Callable[..., None], name: str, words: list[str]) -> int:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
            raise UserError(f"{name}: {' '.join(message.split())}")

    parser = Parser(prog=f"loratune {name}", description=(verb.__doc__ or "").split("Args:")[0])
    positional = {"inspect": ["file"]}.get(name, [])
    parser.add_function_arguments(verb, as_positional=bool(positional))
    given = [
        f"{word}+" if word in REPEATABLE else word.replace("=", "+=", 1) if _repeated(word) else word for word in words
    ]
    values = parser.instantiate_classes(parser.parse_args(given))
    verb(**values.as_dict())
    return 0


def _repeated(word: str) -> bool:
    return any(word.startswith(f"{flag}=") for flag in REPEATABLE)


if __name__ == "__main__":
    sys.exit(main())
