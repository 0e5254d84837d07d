"""One HTML file that needs nothing else: tables, pictures inside it, no network, no script."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what it shows."""

    source: str
    """Address of the image; a ``data:`` address, so that the page needs no other file."""
    alternative: str
    """What a reader who does not see it is told, in a few words."""
    caption: str
    """What is seen, and how it was computed."""

    def render(self) -> str:
        """Return the picture as HTML."""
        return (
            f'<figure><div class="wide"><img src="{html.escape(self.source)}" '
            f'alt="{html.escape(self.alternative)}"></div>'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: str | None = None
    """Show the table only when this line is clicked."""

    def render(self) -> str:
        """Return the table as HTML."""
        head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in self.header)
        body = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(text)}</td>" for text in row[1:])
            + "</tr>"
            for row in self.rows
        )
        caption = f'<p class="note">{html.escape(self.caption)}</p>' if self.caption else ""
        table = (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{caption}"
        )
        if self.folded is None:
            return table
        return f"<details><summary>{html.escape(self.folded)}</summary>{table}</details>"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a paragraph, and what stands below it."""

    title: str
    text: str = ""
    parts: Sequence[Picture | Table] = ()

    def render(self) -> str:
        """Return the section as HTML."""
        text = f"<p>{html.escape(self.text)}</p>" if self.text else ""
        parts = "".join(part.render() for part in self.parts)
        return f"<section><h2>{html.escape(self.title)}</h2>{text}{parts}</section>"


_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: #fff; color: #222;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #ddd }
p, figcaption { max-width: 46rem }
figure { margin: 1.25rem 0 }
figcaption, .note, td, th, details { font-size: .9rem }
figcaption, .note { color: #444; margin-top: .35rem }
.wide { overflow-x: auto }
img { display: block; width: 100%; min-width: 38rem; height: auto }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e3e3; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums }
th { font-weight: 600 }
tbody th { font-weight: 400; white-space: nowrap }
summary { cursor: pointer; margin: .75rem 0 }
footer { margin-top: 3rem; color: #666; font-size: .85rem }
"""


def render_page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """Return a whole HTML document; every text is escaped."""
    body = "".join(section.render() for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}"
        f"<footer>{html.escape(footer)}</footer></body></html>\n"
    )
