"""A report as one HTML page that needs nothing beside it: no script, no style sheet, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

Drawn = tuple[str, str, bytes]
"""Title, sentence and PNG of a picture."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
p, li { max-width: 48rem; } .quiet { color: #57606a; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #d0d7de; text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; } td.words { white-space: normal; } tr.base { background: #f3f6f9; }
.stands { color: #1a7f37; font-weight: 600; } .moves { color: #c0272d; font-weight: 600; }
.unclear { color: #57606a; font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { max-width: 48rem; color: #57606a; }
pre { background: #f3f6f9; padding: 0.8rem; overflow-x: auto; }
"""
_SHOWN = 40  # lines of a list; the others are counted


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: plain text, the heading too.
        parts: HTML of what follows.

    Examples:
        >>> "<h1>a &lt; b</h1>" in page("a < b", [])
        True
    """
    title = escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def table(header: Iterable[str], rows: Iterable[Sequence[str]], *, marked: Iterable[int] = ()) -> str:
    """Return a table of plain texts, whose rows of some numbers are marked as the base's."""
    base = set(marked)
    return table_of(
        header,
        (
            f"<tr{' class=' + repr('base') if i in base else ''}>{''.join(f'<td>{escape(x)}</td>' for x in row)}</tr>"
            for i, row in enumerate(rows)
        ),
    )


def table_of(header: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table whose rows are HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"


def figures(drawn: Iterable[Drawn]) -> list[str]:
    """Return pictures, each with what there is to see in it."""
    return [_figure(*picture) for picture in drawn]


def _figure(title: str, sentence: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<figure><h3>{escape(title)}</h3>{image}<figcaption>{escape(sentence)}</figcaption></figure>"


def listing(texts: Sequence[str]) -> list[str]:
    """Return plain texts as a list, the first forty of them."""
    if not texts:
        return ["<p>None.</p>"]
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return ["<ul>", *(f"<li>{escape(text)}</li>" for text in [*texts[:_SHOWN], *more]), "</ul>"]


def paragraphs(texts: Iterable[str], otherwise: str = "") -> list[str]:
    """Return plain texts as paragraphs; where there is none, what is said instead."""
    return [f"<p>{escape(text)}</p>" for text in list(texts) or filter(None, [otherwise])]
