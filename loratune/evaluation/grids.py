"""Images beside one another, with words."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, INK, PAPER = 6, (40, 40, 40), (255, 255, 255)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """Images in a table.

    Args:
        rows: images, row by row; shorter rows leave cells empty.
        columns: words above the columns.
        names: words before the rows.
        cell: side of a cell in pixels; smaller images are enlarged to it.
    """
    font = ImageFont.load_default(size=max(11, cell // 9))
    wrapped = [_wrap(text, font, cell) for text in columns]
    line = max(11, cell // 9) + 4
    top = (max(text.count("\n") for text in wrapped) + 1) * line + MARGIN if wrapped else 0
    left = int(max(font.getlength(text) for text in names)) + 3 * MARGIN if names else 0
    step = cell + MARGIN
    width = left + step * max(len(row) for row in rows) + MARGIN
    sheet = Image.new("RGB", (width, top + step * len(rows) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(wrapped):
        place = (left + MARGIN + number * step + cell // 2, top - 2)
        pen.multiline_text(place, text, INK, font, anchor="md", align="center")
    for y, row in enumerate(rows):
        if names:
            pen.text((MARGIN, top + y * step + step // 2), names[y], INK, font, anchor="lm")
        for x, image in enumerate(row):
            shown = image.resize((cell, cell), Image.Resampling.LANCZOS) if image.width != cell else image
            sheet.paste(shown, (left + MARGIN + x * step, top + MARGIN // 2 + y * step))
    return sheet


def captioned(images: Sequence[Image.Image], captions: Sequence[str], across: int = 4, cell: int = 128) -> Image.Image:
    """Images in rows of `across`, each below its caption."""
    starts = range(0, len(images), across)
    rows = [grid([images[i : i + across]], captions[i : i + across], cell=cell) for i in starts]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:most]) + ("…" if len(lines) > most else "")
