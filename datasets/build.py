"""Rebuild the image sets from their published sources: `python datasets/build.py base ink`.

Needs npm (to fetch the icon packages) and `pip install resvg-py` (to draw them).

base  datasets/base-SIZE.parquet: Noto ("red apple") and Fluent flat ("red apple, flat style") of
      the first things (--things) of the categories of ink, those of ink before all others: the
      images that the embedded base is trained on. Not committed.
ink   datasets/ink/ and datasets/ink-heldout/: Fluent high contrast, the black-ink style of the
      quickstart, with captions that the base knows from the other drawings. Committed.
      datasets/noto-heldout/: what the base has seen for the captions of ink-heldout.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = {  # npm package -> (version, sha256 of its tarball, suffix that names the style in a caption)
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", ""),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ", flat style",
    ),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "",
    ),
}
INK_CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
INK_TRAINING, INK_HELD_OUT = 240, 60


def fetch(source: str, folder: Path) -> dict[str, Any]:
    """The icon set of one npm package: SVG bodies by name, and categories."""
    version, digest, _ = SOURCES[source]
    package = f"@iconify-json/{source}@{version}"
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    archive = folder / done.stdout.strip().splitlines()[-1]
    if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{package}: the tarball is not the one this script was written for")
    with tarfile.open(archive) as tar:
        icons: dict[str, Any] = json.load(tar.extractfile("package/icons.json"))  # type: ignore[arg-type]
        icons["categories"] = json.load(tar.extractfile("package/metadata.json"))["categories"]  # type: ignore[arg-type]
    return icons


def draw(icons: dict[str, Any], name: str, size: int) -> bytes:
    """One icon as PNG on white, size x size pixels, with a margin of 1/16."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    inner = size - size // 8
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=4 * inner, height=4 * inner)
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    image = image.resize((inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, (size // 16, size // 16))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def caption(name: str) -> str:
    """The words of an icon's name: 'womans-hat' -> "woman's hat"."""
    words = re.sub(r"\b((?:wo)?man)s\b", r"\1's", name.replace("-", " "))
    return words.replace("oclock", "o'clock")


def shared_names(sets: dict[str, dict[str, Any]]) -> list[str]:
    """Names drawn in every style, without the copies in other skin tones, by a stable hash."""
    names = set.intersection(*(set(icons["icons"]) for icons in sets.values()))
    names = {name for name in names if not re.search(r"skin-tone|-tone\d|^flag-", name)}
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def things(sets: dict[str, dict[str, Any]]) -> list[str]:
    """Names drawn in every style, of the categories that ink takes, by a stable hash."""
    categories = sets["fluent-emoji-high-contrast"]["categories"]
    wanted = {name for category in INK_CATEGORIES for name in categories[category]}
    return [name for name in shared_names(sets) if name in wanted]


def build_base(sets: dict[str, dict[str, Any]], size: int, count: int) -> Path:
    """Both drawings of the first `count` things, as one parquet file with columns image and caption."""
    from datasets import Dataset, Features, Image, Value

    def rows() -> Iterator[dict[str, Any]]:
        for name in things(sets)[:count]:
            for source in ("noto", "fluent-emoji-flat"):
                image = {"bytes": draw(sets[source], name, size), "path": f"{source}/{name}.png"}
                yield {"image": image, "caption": caption(name) + SOURCES[source][2]}

    path = HERE / f"base-{size}.parquet"
    features = Features({"image": Image(), "caption": Value("string")})
    Dataset.from_list(list(rows()), features=features).to_parquet(path)
    return path


def write_folder(folder: Path, images: dict[str, bytes]) -> None:
    """An image folder as users have it: PNG files and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, data in sorted(images.items()):
        (folder / f"{name}.png").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption(name)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def build_ink(sets: dict[str, dict[str, Any]], size: int) -> None:
    """The quickstart's style in two folders that share no caption, and Noto's drawings of the second."""
    ink, noto = sets["fluent-emoji-high-contrast"], sets["noto"]
    names = things(sets)
    held_out, training = names[:INK_HELD_OUT], names[INK_HELD_OUT : INK_HELD_OUT + INK_TRAINING]
    write_folder(HERE / "ink", {name: draw(ink, name, size) for name in training})
    write_folder(HERE / "ink-heldout", {name: draw(ink, name, size) for name in held_out})
    write_folder(HERE / "noto-heldout", {name: draw(noto, name, size) for name in held_out})


def main() -> None:
    """Build what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["base", "ink"])
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--things", type=int, default=500, help="for base: how many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = {source: fetch(source, Path(folder)) for source in SOURCES}
    if "base" in options.what:
        print(build_base(sets, options.size, options.things))
    if "ink" in options.what:
        build_ink(sets, options.size)
        print(HERE / "ink", HERE / "ink-heldout", HERE / "noto-heldout")


if __name__ == "__main__":
    main()
