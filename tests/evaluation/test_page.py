"""The page needs nothing but itself, and believes no text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from loratune.evaluation.curves import Series, chart
from loratune.evaluation.page import Card, Page, Shown, data_uri, render

EVIL = '<script src="http://evil.example/x.js">&'


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def whole() -> Page:
    return Page(
        title=EVIL,
        subtitle=EVIL,
        facts=[(EVIL, EVIL)],
        warnings=[EVIL],
        cards=[Card(EVIL, chart([Series(EVIL, [(0, 1.0), (1, 2.0)], [0.1, 0.1])], unit=EVIL), EVIL)],
        head=(EVIL,),
        rows=[[EVIL]],
        shown=[Shown(EVIL, Image.new("RGB", (8, 8)), EVIL)],
        recipe=EVIL,
    )


def test_every_text_is_escaped_and_nothing_is_loaded() -> None:
    text = render(whole())
    reader = read(text)
    tags = [tag for tag, _ in reader.tags]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    for _, attributes in reader.tags:
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", text)
    assert "http:" not in re.sub(r"&lt;script.*?&gt;", "", text)
    assert "".join(reader.words).count(EVIL) >= 10


def test_parts_that_are_empty_are_left_out() -> None:
    words = "".join(read(render(Page("a run"))).words)
    assert "a run" in words
    for title in ("Curves", "Numbers", "Images", "Recipe"):
        assert title not in words
        assert title in "".join(read(render(whole())).words)


def test_images_are_reduced_until_the_page_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    page = Page("a", shown=[Shown(str(i), Image.fromarray(noise)) for i in range(4)], most_bytes=1_000_000)
    assert len(render(page)) < 1_100_000
    plain = Image.new("RGB", (30, 20), "red")
    kept = data_uri(plain, 10_000)
    assert kept.startswith("data:image/png;base64,")
    back = Image.open(io.BytesIO(base64.b64decode(kept.partition(",")[2])))
    assert back.size == (30, 20)
    assert back.getpixel((3, 3)) == (255, 0, 0)
