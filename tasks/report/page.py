"""The parts a self-contained HTML page is made of: escaped text, tables, pictures, folded parts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Nothing may be fetched: the page says so itself, and a browser holds it to that.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #222;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0 0 4px; font-size: 28px; line-height: 1.2; }
h2 { margin: 0 0 12px; font-size: 20px; }
h3 { margin: 24px 0 8px; font-size: 16px; }
p { margin: 8px 0; max-width: 95ch; }
section { margin: 20px 0; padding: 24px 28px; background: #fff; border: 1px solid #dfe2e6;
  border-radius: 8px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr));
  gap: 6px 28px; margin: 16px 0 0; }
.facts div { overflow-wrap: anywhere; }
dt, .small { color: #5b6168; font-size: 13px; }
dd { margin: 0; }
.verdict { font-size: 16px; }
.box { margin: 16px 0 0; padding: 12px 18px; border: 2px solid #a33b00; border-radius: 6px;
  background: #fff3ea; overflow-wrap: anywhere; }
.box ul, .notes { margin: 6px 0; padding-left: 22px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 4px; font-variant-numeric: tabular-nums; }
table.full { width: 100%; }
th, td { padding: 7px 12px; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e6e8eb; }
thead th { vertical-align: bottom; border-bottom: 2px solid #b9bec5; font-size: 13.5px; }
th:first-child, th.text, td.text { text-align: left; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody.apart { border-top: 2px solid #b9bec5; background: #f7f8f9; font-style: italic; }
tbody.apart .small { font-style: normal; }
td .small, th .small { display: block; font-weight: 400; white-space: nowrap; }
td.mean, th.mean { background: #f2f5f9; }
.best { font-weight: 700; }
.dot { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 3px; }
.up { color: #00508a; font-weight: 600; }
.down { color: #a33b00; font-weight: 600; }
.open { color: #5b6168; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 20px; align-items: start; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #5b6168; font-size: 13px; margin-top: 4px; }
details { margin: 12px 0 0; }
summary { cursor: pointer; color: #00508a; }
pre { overflow-x: auto; padding: 14px; background: #f7f8f9; font-size: 13px; border-radius: 6px; }
@media print { section { break-inside: avoid; } body { background: #fff; } }
"""


def page(title: str, body: str) -> str:
    """A whole document. `title` is a text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def tag(name: str, inner: str, **attributes: object) -> str:
    """An element around HTML. `data_task=` gives `data-task`, `class_=` gives `class`.

    Attributes that are None are left out; their values are escaped, `inner` is not.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{inner}</{name}>"


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; nothing where all of `parts` (HTML) are empty."""
    inner = "\n".join(part for part in parts if part)
    return tag("section", f"<h2>{escape(title)}</h2>\n{inner}") if inner else ""


def folded(title: str, inner: str) -> str:
    """HTML behind a line that opens it; nothing where it is empty."""
    return f"<details><summary>{escape(title)}</summary>\n{inner}</details>" if inner else ""


def table(head: Sequence[str], *bodies: Sequence[str], full: bool = True) -> str:
    """`head`: the header row's cells; `bodies`: rows each; those after the first are set apart."""
    rows = [f"<thead>{row(head)}</thead>"]
    for number, body in enumerate(bodies):
        if body:
            rows.append(tag("tbody", "\n".join(body), class_="apart" if number else None))
    whole = tag("table", "\n".join(rows), class_="full" if full else None)
    return tag("div", whole, class_="wide")


def row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def small(text: str) -> str:
    return tag("span", escape(text), class_="small")


def picture(source: str, alt: str, caption: str = "") -> str:
    """A picture by its data URI, with the text that stands for it."""
    image = f'<img src="{escape(source)}" alt="{escape(alt)}">'
    return tag("figure", image + (tag("figcaption", escape(caption)) if caption else ""))


def pictures(listed: Sequence[str]) -> str:
    return tag("div", "\n".join(listed), class_="pictures") if listed else ""
