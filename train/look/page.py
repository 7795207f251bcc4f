"""The parts of a page and the page itself, as self-contained HTML: no network, no scripts."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from command import printable

MOST_BYTES = 8_000_000
# Names of classes and files are cut off after this many characters.
_LETTERS = 80

# Colours follow the reader's theme through system colours; charts are dark on white in both.
_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem 1.25rem 4rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid #8884; }
p, ul { max-width: 46rem; }
.quiet { color: color-mix(in srgb, CanvasText 65%, Canvas); font-size: 0.9rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; font-size: 0.9rem; margin: 0.75rem 0; }
.notes { border-left: 4px solid #d98e04; padding: 0.5rem 0.5rem 0.5rem 1rem; background: #d98e0414; margin: 1rem 0; }
.notes ul { margin: 0; padding-left: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
th { font-weight: 600; }
.number { text-align: right; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: 0.5rem; border-radius: 0.5rem; background: white; }
figcaption { margin-top: 0.5rem; font-size: 0.9rem; max-width: 46rem; }
.cards { display: grid; gap: 1rem; margin: 1rem 0; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
.cards.double { grid-template-columns: repeat(auto-fill, minmax(19.5rem, 1fr)); }
.card { border: 1px solid #8884; border-radius: 0.5rem; padding: 0.6rem; font-size: 0.85rem; line-height: 1.35;
  overflow-wrap: anywhere; display: flex; flex-direction: column; gap: 0.4rem; }
.pictures { display: flex; gap: 0.5rem; align-items: flex-start; justify-content: center; height: 9rem; }
.pictures img { display: block; max-height: 9rem; max-width: 100%; object-fit: contain; border-radius: 0.2rem; }
.double .pictures img { max-width: calc(50% - 0.25rem); height: 100%; width: auto; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 0.1rem 0.6rem; margin: 0; }
.card dt { color: color-mix(in srgb, CanvasText 65%, Canvas); }
.card dd { margin: 0; }
.file { color: color-mix(in srgb, CanvasText 60%, Canvas); font-size: 0.75rem; }
.other { background: #d98e0433; border-radius: 0.2rem; padding: 0 0.2rem; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page with its own heading. body: HTML."""

    anchor: str
    heading: str
    body: str


def shortened(name: str) -> str:
    """At most 80 characters of a name."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def text(name: str) -> str:
    """Any text as HTML on one line, cut off after 80 characters."""
    return html.escape(shortened(printable(name)))


def _path(file: str) -> str:
    """A path as HTML; of a longer one the end, which is more informative."""
    shown = printable(file)
    return html.escape(shown if len(shown) <= _LETTERS else f"…{shown[1 - _LETTERS :]}")


def paragraph(words: str, *, quiet: bool = False) -> str:
    """words: plain text."""
    return f"<p{' class=quiet' if quiet else ''}>{html.escape(printable(words))}</p>"


def figure(png: bytes, alt: str, caption: str) -> str:
    """A chart with caption and alternative text, both plain text."""
    source = base64.b64encode(png).decode()
    said = html.escape(printable(alt))
    return (
        f'<figure><img alt="{said}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(printable(caption))}</figcaption></figure>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> str:
    """heads, rows: plain text. numbers: the heads of columns that are aligned to the right."""
    kinds = [" class=number" if head in numbers else "" for head in heads]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<div class=wide><table><thead>{line('th', heads)}</thead><tbody>\n{body}\n</tbody></table></div>"


def folded(summary: str, body: str) -> str:
    """HTML that is shown after a click on the summary (plain text)."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def card(pictures: Sequence[tuple[str, str]], lines: Sequence[tuple[str, str, bool]], *files: str) -> str:
    """A card of pictures and facts about them.

    pictures: (data: address, what it shows). lines: (source, class, whether to mark it as another class than the
    image's). files: names of the image's files.
    """
    shown = "".join(f'<img alt="{text(alt)}" src="{address}">' for address, alt in pictures)
    said = "".join(
        f"<dt>{text(who)}</dt><dd>{f'<span class=other>{text(what)}</span>' if other else text(what)}</dd>"
        for who, what, other in lines
    )
    named = "".join(f"<div class=file>{_path(file)}</div>" for file in files)
    return f"<div class=card><div class=pictures>{shown}</div><dl>{said}</dl>{named}</div>"


def cards(several: Sequence[str], *, double: bool = False) -> str:
    """double: cards with two pictures."""
    return f'<div class="cards{" double" if double else ""}">\n{chr(10).join(several)}\n</div>'


def document(title: str, under: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. title, under (a line below it), notes (shown first): plain text."""
    links = "".join(f'<a href="#{each.anchor}">{html.escape(each.heading)}</a>' for each in sections)
    body = "\n".join(f"<h2 id={each.anchor}>{html.escape(each.heading)}</h2>\n{each.body}" for each in sections)
    noted = "".join(f"<li>{html.escape(printable(note))}</li>" for note in notes)
    first = f"<div class=notes><ul>{noted}</ul></div>" if notes else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
{paragraph(under, quiet=True)}
{first}
<nav>{links}</nav>
{body}
</main>
</body>
</html>
"""
