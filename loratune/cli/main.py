"""The command line. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from loratune import __version__
from loratune.errors import UserError

DType = Literal["float32", "float16", "bfloat16"]
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
    guidance_scale: float = 4.0,
    sampler: str = "ddim",
    seed: int = 0,
    count: int = 1,
    size: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    embedding: list[Path] = [],  # noqa: B006
    chunks: int = 1,
    weights: bool = False,
    captions: bool = False,
) -> None:
    """Draw images: a PNG for each prompt and seed, and a grid of them all.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, or FILE:WEIGHT; repeat it to add several.
        prompt: what to draw; repeat it for several images.
        prompts: a text file with one prompt a line.
        out: folder for the images.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        sampler: ddim, ddpm, euler, euler-a, dpm++ or unipc.
        seed: of the first image of each prompt; the same seed and prompt give the same image.
        count: images for each prompt, from seed, seed + 1, and so on.
        size: side in pixels; by default the base's own.
        batch_size: images drawn at once; above 1 the last bits of an image may depend on it.
        device: auto, cpu, cuda, cuda:1, mps.
        embedding: a file with a learned token (textual inversion), which prompts then may name; repeat it.
        chunks: windows of 75 tokens that a prompt may fill.
        weights: read (word:1.2) in prompts as a weight; brackets that are meant are then written \\( and \\).
        captions: write the prompt beside each image (.txt), and no grid: a folder to train on.
    """
    from loratune.cli.draw import sample as run

    listed = [line.strip() for line in _read(prompts).splitlines() if line.strip()] if prompts else []
    if not prompt and not listed:
        raise UserError("sample: nothing to draw; give --prompt TEXT or --prompts FILE")
    wanted = [*prompt, *listed]
    run(
        base,
        lora,
        wanted,
        out,
        steps,
        guidance_scale,
        sampler,
        seed,
        count,
        size,
        batch_size,
        device,
        embedding,
        chunks,
        weights,
        captions,
    )


def merge(
    base: str,
    lora: list[str],
    out: Path,
    exact: bool = False,
    allow_partial: bool = False,
    in_place: bool = False,
    unmerge: bool = False,
    json: bool = False,
) -> None:
    """Add LoRAs to a checkpoint: W' = W_0 + weight (alpha / r) B A, rounded once; the rest stays byte for byte.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, FILE:WEIGHT, or FILE:WEIGHT,down=1,mid=0.5,up.3=0,te=0.2 with ratios by block that are
            multiplied with the weight (the longest fitting name counts); repeat it to add several.
        out: a .safetensors file (U-Net, text encoders and VAE in one), or a folder in diffusers' layout.
        exact: compute in float64 instead of float32.
        allow_partial: leave out the layers of a LoRA that the base lacks, instead of refusing it.
        in_place: let --out be the base itself; it is replaced when the new one is whole.
        unmerge: subtract the LoRAs, and say how far rounding leaves the result from the original base.
        json: print what was done as JSON.
    """
    from loratune.lora.merge.run import merge as run

    run(base, lora, out, exact, allow_partial, in_place, unmerge, json)


def inspect(file: Path, json: bool = False, diff: Path | None = None) -> None:
    """Say what a .safetensors file is: a LoRA's kind, family, rank, norms and who reads it; a checkpoint's family.

    Args:
        file: a LoRA or a checkpoint (or a diffusers folder).
        json: print JSON.
        diff: another LoRA: print how both differ.
    """
    from loratune.lora.inspect import inspect as run

    run(file, json, diff)


def convert(
    file: Path, to: Literal["peft", "kohya"], out: Path, dtype: DType | None = None, rank: int | None = None
) -> None:
    """Write a LoRA in another format: exactly, or not at all unless --rank allows an approximation.

    Args:
        file: a LoRA in any format.
        to: peft (diffusers' own), or kohya (ComfyUI, A1111, sd-scripts).
        out: a .safetensors file.
        dtype: of the tensors; by default as they are.
        rank: approximate at this rank what the format cannot hold, and print the error.
    """
    from loratune.lora.convert import convert as run

    run(file, to, out, dtype, rank)


def combine(
    lora: list[str],
    out: Path,
    rank: int | None = None,
    to: Literal["peft", "kohya"] | None = None,
    dtype: DType | None = None,
) -> None:
    """Make one LoRA of several: sum w_i (alpha_i / r_i) B_i A_i, exactly (the ranks add up) or at --rank.

    Args:
        lora: a LoRA file, or FILE:WEIGHT; repeat it. A weight may be negative.
        out: a .safetensors file.
        rank: of the result, by SVD, with the error printed; by default the sum of the ranks.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts); by default as the first LoRA.
        dtype: of the tensors; by default the widest of the LoRAs'.
    """
    from loratune.lora.combine import combine as run

    run(lora, out, rank, to, dtype)


def resize(
    file: Path,
    out: Path,
    rank: int | None = None,
    keep: float | None = None,
    to: Literal["peft", "kohya"] | None = None,
    dtype: DType | None = None,
) -> None:
    """Give a LoRA another rank: the nearest B A of each layer, by SVD, with the error printed.

    Args:
        file: a LoRA in any format.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: or for each layer the smallest rank that keeps this share of its squared Frobenius norm, such as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts); by default as the file.
        dtype: of the tensors; by default as they are.
    """
    from loratune.lora.resize import resize as run

    run(file, out, rank, keep, to, dtype)


def extract(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None = None,
    keep: float | None = None,
    to: Literal["peft", "kohya"] = "peft",
    dtype: DType = "float16",
) -> None:
    """Write the LoRA that turns one checkpoint into another: the nearest B A to W - W_0 of each layer.

    Args:
        base: the checkpoint before: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        tuned: the checkpoint after, of the same architecture; it may be a folder where the other is a file.
        out: a .safetensors file.
        rank: of every layer (less where a layer has less).
        keep: or for each layer the smallest rank that keeps this share of its squared Frobenius norm, such as 0.95.
        to: peft (diffusers' own) or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the tensors.
    """
    from loratune.lora.extract import extract as run

    run(base, tuned, out, rank, keep, to, dtype)


def measure(
    base: str,
    what: Literal["vae", "nearest", "style"],
    data: str,
    lora: list[str] = [],  # noqa: B006
    style: str | None = None,
    samples: int = 200,
    size: int = 64,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Measure a base or a LoRA on real captioned images, and print JSON.

    vae: PSNR in dB of the VAE's reconstructions. nearest: how often the nearest of 20 random real
    images to a sample, by shape and by colour, is the one of its caption (chance is 5 %). style: how far
    a LoRA moves the mean colourfulness of samples from the base's to the style's, on the captions of `data`.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        what: vae, nearest or style.
        data: captioned images: a folder, a .parquet file or a hub name; for style, the base's drawings.
        lora: a LoRA file, or FILE:WEIGHT; repeat it to add several.
        style: for style: the style's own images of the captions of `data`.
        samples: how many images to measure.
        size: side in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance.
        seed: of the samples and of the choice of images.
        out: also write the JSON here.
    """
    from loratune.evaluation.measure import measure as run

    run(base, what, data, lora, style, samples, size, steps, guidance_scale, seed, out)


def data(recipe: Path, json: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Look at a recipe's images before training: counts, sizes, captions, and each fault by name.

    Nothing is encoded or written but FILE. The exit code is 1 where something should be mended.

    Args:
        recipe: whose images; its keys can be overridden, as in --data.resolution 512.
        json: a file that gets everything that was found.
    """
    from loratune.cli.look import data as look

    return int(look(recipe, json, overrides))


def cache(recipe: Path, overrides: Sequence[str] = ()) -> None:
    """Encode a recipe's images and captions into the cache, and stop; what is there already is kept.

    Args:
        recipe: whose images; its keys can be overridden, as in --data.num_workers 4.
    """
    from loratune.cli.look import cache as encode

    encode(recipe, overrides)


def plan(
    recipe: Path,
    device: str | None = None,
    run: bool = False,
    steps_per_second: float | None = None,
    json: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Say what a recipe will need before it starts: parameters, memory by part, steps, images, time.

    Nothing is trained and no weight is read; shapes alone are followed through one step.

    Args:
        recipe: what is to be trained; its keys can be overridden, as in --data.batch_size 2.
        device: cpu, gpu, or a GPU's memory such as 24GB (10^9) or 23.5GiB (2^30), into which the run should fit.
        run: also encode the images, and take true steps in each bucket here.
        steps_per_second: of this recipe, where you know it; for the expected time.
        json: print JSON.
    """
    from loratune.planning.plan import plan as make

    make(recipe, device, run, steps_per_second, json, overrides)


def quickstart(
    recipe: Path = Path("recipes/quickstart.yaml"), out: Path = Path("runs/quickstart"), weight: float = 0.75
) -> None:
    """Train the quickstart's LoRA, merge it, draw before and after, and measure: what `make demo` runs.

    Args:
        recipe: what to train.
        out: folder of the run; an earlier one there is replaced.
        weight: how strongly the LoRA counts in the merged checkpoint and its images; less keeps more of the base.
    """
    from loratune.cli.demo import quickstart as run

    run(recipe, out, weight)


VERBS: dict[str, Callable[..., int | None]] = {
    "sample": sample,
    "merge": merge,
    "inspect": inspect,
    "convert": convert,
    "combine": combine,
    "resize": resize,
    "extract": extract,
    "measure": measure,
    "data": data,
    "cache": cache,
    "plan": plan,
    "quickstart": quickstart,
}
REPEATABLE = ("--lora", "--prompt", "--embedding")
POSITIONAL = {
    "inspect": "file",
    "convert": "file",
    "resize": "file",
    "plan": "recipe",
    "data": "recipe",
    "cache": "recipe",
}


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
    from loratune.cli.quiet import quiet

    quiet()
    try:
        if words[0] in RECIPE_VERBS:
            from loratune.recipe.parse import run

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


def _run_verb(verb: Callable[..., int | None], name: str, words: list[str]) -> int:
    from jsonargparse import ArgumentParser

    from loratune.cli.help import VerbHelp, usage_of

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
            raise UserError(f"{name}: {' '.join(message.split())}")

    positional, given = POSITIONAL.get(name), {}
    if positional == "recipe":
        words, given["overrides"] = overridden(words)
    parser = Parser(
        prog=f"loratune {name}",
        usage=usage_of(name, verb, positional),
        description=(verb.__doc__ or "").split("Args:")[0],
        formatter_class=VerbHelp,
    )
    if positional:
        parser.add_argument(positional, type=Path, help=_help_of(verb, positional))
    parser.add_function_arguments(verb, as_group=False, skip={positional, "overrides"} if positional else None)
    values = parser.instantiate_classes(parser.parse_args(_words(verb, words)))
    return verb(**values.as_dict(), **given) or 0


def overridden(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without those that override a recipe's keys, such as --data.resolution 512, and these."""
    rest: list[str] = []
    keys: list[str] = []
    pending = False
    for word in words:
        key = word.startswith("--") and ("." in word.partition("=")[0] or word.startswith("--seed_everything"))
        (keys if key or pending else rest).append(word)
        pending = key and "=" not in word
    return rest, keys


def _help_of(verb: Callable[..., int | None], name: str) -> str:
    """What a verb's docstring says of an argument."""
    lines = (line.strip() for line in (verb.__doc__ or "").splitlines())
    return next(line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))


def _words(verb: Callable[..., int | None], words: Sequence[str]) -> list[str]:
    """The words as jsonargparse takes them: `--in-place` is `--in_place=true`, and `--lora` adds to a list."""
    given = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        kind = str(verb.__annotations__.get(key)) if flag.startswith("--") else "None"
        if kind == "None":
            given.append(word)
        elif kind == "bool" and not equals and after not in ("true", "false"):
            given.append(f"--{key}=true")
        else:
            given.append(f"--{key}{'+' if flag in REPEATABLE else ''}{equals}{value}")
    return given


if __name__ == "__main__":
    sys.exit(main())
