"""One HTML page about a run that needs nothing else: pictures lie in it as data."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A question about the run and its answer.

    text: paragraphs that say what is seen and how to read it. pictures: (what it shows, PNG).
    """

    title: str
    text: Sequence[str]
    pictures: Sequence[tuple[str, bytes]] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The page's text."""
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    links = " ".join(f'<a href="#part-{i}">{html.escape(s.title)}</a>'
                     for i, s in enumerate(sections))
    filled = {"title": html.escape(title), "lead": html.escape(lead), "contents": links,
              "sections": "\n".join(_section(i, s) for i, s in enumerate(sections)),
              "footer": html.escape(footer)}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _section(index: int, section: Section) -> str:
    parts = [f'<section id="part-{index}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [_table(table) for table in section.tables]
    parts += [f'<figure><img alt="{html.escape(what, quote=True)}" src="data:image/png;base64,'
              f'{base64.b64encode(png).decode()}"></figure>' for what, png in section.pictures]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows)
    return (f'<div class="wide"><table><caption>{html.escape(table.caption)}</caption><thead><tr>'
            f"{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>")
