"""report.html: `ReportData` put into the templates beside this file, as one self-contained page.

Texts that come from data are escaped by the templates. Nothing but the templates is read.
"""

from __future__ import annotations

from functools import cache, partial

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.errors import label, printable
from tasks.report.answers import alike
from tasks.report.charts import LINES, bars, curves, heat, style
from tasks.report.differences import SAME, claims, leaders, none_at_all
from tasks.report.page_data import ReportData
from tasks.report.table import BELOW_ZERO

SHARE = "share_of_attainable"


def report_html(data: ReportData) -> str:
    """The page. The same data give the same bytes."""
    means = data.tables[0].cells.values()
    page = _templates().get_template("report.html.jinja")
    return page.render(
        dict(data),
        verdict=verdict(data),
        leaders=partial(leaders, data),
        shares_are_known=any(SHARE in scores for t in means for scores in t.scores.values()),
    )


def verdict(data: ReportData) -> Markup:
    """One paragraph made of the numbers, as HTML: what is best, and which differences hold."""
    template = _templates().get_template("verdict.html.jinja")
    text = template.render(dict(data), leaders=partial(leaders, data), claims=claims(data))
    return Markup(" ".join(text.split()) or "Nothing was scored.")


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("tasks.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"label": label, "printable": printable}
    functions = (alike, bars, curves, heat, none_at_all, style)
    templates.globals |= {function.__name__: function for function in functions}
    templates.globals |= {"BELOW_ZERO": BELOW_ZERO, "LINES": LINES, "SAME": SAME}
    return templates
