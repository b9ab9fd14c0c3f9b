"""Every image of a grid is in its cell, whole, and words are where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from loratune.evaluation.grids import MARGIN, PAPER, captioned, grid

CELL = 32
STEP = CELL + MARGIN


def colour(row: int, column: int) -> tuple[int, int, int]:
    return (40 + 50 * row, 30 + 40 * column, 200)


def images(rows: int, columns: int, size: int = CELL) -> list[list[Image.Image]]:
    return [[Image.new("RGB", (size, size), colour(y, x)) for x in range(columns)] for y in range(rows)]


def cells(sheet: Image.Image, rows: int, columns: int) -> tuple[int, int]:
    """Find where the cells begin, check that each holds its colour and nothing else does; (left, top)."""
    values = np.asarray(sheet)
    corners = {}
    for y in range(rows):
        for x in range(columns):
            at = np.argwhere((values == colour(y, x)).all(2))
            assert len(at) == CELL * CELL, (y, x)
            (top, left), (bottom, right) = at.min(0), at.max(0)
            assert (bottom - top, right - left) == (CELL - 1, CELL - 1)
            corners[y, x] = (int(left), int(top))
    left, top = corners[0, 0]
    assert corners == {(y, x): (left + x * STEP, top + y * STEP) for y in range(rows) for x in range(columns)}
    return left, top


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 2)])
def test_each_image_is_in_its_cell(rows: int, columns: int) -> None:
    sheet = grid(images(rows, columns), cell=CELL)
    assert sheet.size == (columns * STEP + MARGIN, rows * STEP + MARGIN)
    left, top = cells(sheet, rows, columns)
    assert left == MARGIN
    assert 0 < top <= MARGIN
    rest = (np.asarray(sheet) == PAPER).all(2).sum()
    assert rest == sheet.width * sheet.height - rows * columns * CELL * CELL


@pytest.mark.parametrize("size", [8, 64])
def test_images_of_other_sizes_are_brought_to_the_cell(size: int) -> None:
    cells(grid(images(2, 2, size), cell=CELL), 2, 2)


def test_words_take_room_and_cover_no_image() -> None:
    bare = grid(images(2, 2), cell=CELL)
    both = grid(images(2, 2), ["a red disc", "a blue ring"], ["base", "with the LoRA"], cell=CELL)
    left, top = cells(both, 2, 2)
    assert both.width - bare.width == left - MARGIN > 0
    assert both.height - bare.height >= top - MARGIN > 0
    ink = (np.asarray(both) != PAPER).any(2)
    assert ink[:top].any()
    assert not ink[:top, : left - MARGIN].any()  # nothing above the names
    assert ink[top:, :left].any()
    assert ink[top : top + CELL, :left].any()  # each row has its name
    assert ink[top + STEP : top + STEP + CELL, :left].any()


def test_long_words_are_wrapped_into_three_lines_at_most() -> None:
    short = grid(images(1, 1), ["a"], cell=CELL)
    long = grid(images(1, 1), ["a very long caption of an image " * 8], cell=CELL)
    longer = grid(images(1, 1), ["a very long caption of an image " * 80], cell=CELL)
    assert short.height < long.height == longer.height
    assert short.width == long.width
    cells(longer, 1, 1)


def test_short_rows_leave_cells_empty() -> None:
    rows = images(2, 3)
    rows[1] = rows[1][:1]
    sheet = np.asarray(grid(rows, cell=CELL))
    assert sheet.shape == (2 * STEP + MARGIN, 3 * STEP + MARGIN, 3)
    assert (sheet[STEP + MARGIN :, STEP + MARGIN :] == PAPER).all()


def test_captioned_puts_every_image_in_rows() -> None:
    colours = [(10 * i, 200, 255 - 10 * i) for i in range(6)]
    sheet = captioned([Image.new("RGB", (32, 32), colour) for colour in colours], list("abcdef"), 4, 32)
    found = {colour for _, colour in sheet.getcolors(10**6) or []}
    assert set(colours) <= found
    assert sheet.height > 2 * 32
    assert sheet.width == grid([[Image.new("RGB", (32, 32))] * 4], cell=32).width
