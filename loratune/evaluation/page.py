"""A run as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

MOST_BYTES = 4_000_000  # of all images together, as they are written into the page
WIDEST = 1400  # pixels
STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1d2430;--soft:#667085;--rule:#e4e7ec;--mark:#b54708;
--marked:#fffaeb;--c1:#2563c9;--c2:#d9690f;--c3:#16895a;--c4:#9333a8;--c5:#b8860b;--c6:#c0264b}
@media(prefers-color-scheme:dark){:root{--paper:#14171c;--card:#1c2027;--ink:#e6e9ef;--soft:#98a2b3;--rule:#323945;
--mark:#fdb022;--marked:#2b2416;--c1:#6ea8fe;--c2:#ff9f57;--c3:#4cc79a;--c4:#d08ae0;--c5:#e0b94a;--c6:#ff7a96}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 24px 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:38px 0 12px}h3{font-size:15px;margin:0 0 2px}
p{margin:0 0 8px}.soft,figcaption{color:var(--soft);font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;margin:0}
figure{margin:0 0 16px}figure img{display:block;max-width:100%;height:auto;margin:8px auto 0;border-radius:4px}
.facts{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0 0}
.fact{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:8px 14px}
.fact b{display:block;font-size:18px;font-variant-numeric:tabular-nums}
.fact span{color:var(--soft);font-size:12.5px}
.warning{background:var(--marked);border:1px solid var(--mark);border-left-width:5px;border-radius:8px;
padding:10px 14px;margin:14px 0 0}
svg{display:block;width:100%;height:auto;margin-top:8px}svg text{fill:var(--soft);font-size:12px}
svg .unit{font-style:italic}.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.zero{stroke:var(--soft);
stroke-dasharray:5 4}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}.faint{fill:none;stroke-width:1;
opacity:.35}.band{stroke:none;opacity:.16}
.legend{margin:4px 0 0;font-size:13px;color:var(--soft)}.key{margin-right:14px;white-space:nowrap}
.key::before{content:"";display:inline-block;width:16px;height:3px;border-radius:2px;margin:0 6px 3px 0;
background:currentColor;vertical-align:middle}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--rule);text-align:right;font-weight:400}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-size:13px}
tbody tr:last-child td{border-bottom:0}.scroll{overflow-x:auto}
details{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 16px}
summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;font-size:12.5px;line-height:1.45}
""" + "".join(
    f"polyline.c{n}{{stroke:var(--c{n})}}polygon.c{n},circle.c{n},rect.c{n}{{fill:var(--c{n})}}"
    f".key.c{n}::before{{background:var(--c{n})}}"
    for n in range(1, 7)
)


@dataclass(frozen=True)
class Card:
    """A chart with its title.

    Args:
        title: of it.
        body: HTML that was made here, such as a chart's.
        note: what it shows, in a sentence.
    """

    title: str
    body: str
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """An image with its title.

    Args:
        title: of it.
        image: reduced where it is large.
        note: what it shows.
    """

    title: str
    image: Image.Image
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What the page shows; parts that are empty are left out.

    Args:
        title: of the run.
        subtitle: what it is, in a line.
        facts: names and numbers at the top.
        warnings: what a person has to know.
        cards: charts.
        head: names of the table's columns.
        rows: of the table.
        shown: images.
        recipe: as YAML.
        most_bytes: of all images together.
    """

    title: str
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    cards: Sequence[Card] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    shown: Sequence[Shown] = ()
    recipe: str = ""
    most_bytes: int = MOST_BYTES


def render(page: Page) -> str:
    """The page as HTML; every text is escaped, and nothing is loaded from anywhere."""
    parts = [f"<h1>{escape(page.title)}</h1>"]
    if page.subtitle:
        parts.append(f'<p class="soft">{escape(page.subtitle)}</p>')
    parts += [f'<div class="warning" role="alert">{escape(text)}</div>' for text in page.warnings]
    if page.facts:
        facts = (
            f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in page.facts
        )
        parts.append(f'<div class="facts">{"".join(facts)}</div>')
    cards = [card for card in page.cards if card.body]
    if cards:
        parts.append(f'<h2>Curves</h2><div class="cards">{"".join(map(_card, cards))}</div>')
    if page.rows:
        parts.append(f"<h2>Numbers</h2>{_table(page.head, page.rows)}")
    if page.shown:
        share = page.most_bytes // len(page.shown)
        parts.append("<h2>Images</h2>" + "".join(_figure(shown, share) for shown in page.shown))
    if page.recipe:
        parts.append("<h2>Recipe</h2><details><summary>All settings, as they were resolved</summary>")
        parts.append(f"<pre>{escape(page.recipe)}</pre></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _card(card: Card) -> str:
    note = f'<p class="soft">{escape(card.note)}</p>' if card.note else ""
    return f'<section class="card"><h3>{escape(card.title)}</h3>{note}{card.body}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll">{table}</div>'


def _figure(shown: Shown, most: int) -> str:
    note = f"<figcaption>{escape(shown.note)}</figcaption>" if shown.note else ""
    image = f'<img alt="{escape(shown.title)}" src="{data_uri(shown.image, most)}">'
    return f"<figure><h3>{escape(shown.title)}</h3>{note}{image}</figure>"


def data_uri(image: Image.Image, most: int) -> str:
    """An image inside an address, of at most about `most` bytes: PNG, or JPEG, and then smaller, where it is large."""
    image = image.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    data, kind = _bytes(image, "PNG"), "png"
    while len(data) * 4 > most * 3:
        if kind == "jpeg":
            half = (max(1, image.width * 3 // 4), max(1, image.height * 3 // 4))
            if half == image.size:
                break
            image = image.resize(half, Image.Resampling.LANCZOS)
        data, kind = _bytes(image, "JPEG"), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return buffer.getvalue()
