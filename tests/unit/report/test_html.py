"""The report as a page: what it says, and that no text of the data becomes HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from tasks.methods import METHODS
from tasks.report.charts import style
from tasks.report.page import ReportData, leaders, report_html, verdict
from tests.unit.report.cells import estimate
from tests.unit.report.report_case import HOSTILE, difference, report_case


class Cells(HTMLParser):
    """The data attributes of every table cell, with the text in it; and every tag's name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.found.append({**dict(attrs), "text": ""})
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1]["text"] += f"{data} "

    def one(self, **attributes: str) -> dict[str, Any]:
        wanted = {f"data-{key}": value for key, value in attributes.items()}
        return next(cell for cell in self.found if wanted.items() <= cell.items())


def test_figures_stand_in_cells_unrounded() -> None:
    cells = Cells(report_html(report_case()))
    own = cells.one(task="LaMP-2M", method="mta", metric="accuracy")
    assert own["text"].split() == ["0.612", "[0.500,", "0.700]"]
    assert (own["data-value"], own["data-lo"], own["data-hi"]) == ("0.61234", "0.5", "0.7")
    assert "best" in own["class"]
    share = cells.one(task="LaMP-2M", method="mta", metric="share_of_attainable")
    assert share["text"].split() == ["25.0%", "[-12%,", "50%]"]
    # No interval, and no number.
    share = cells.one(task="mean", method="mta", metric="share_of_attainable")
    assert share["text"].split() == ["12.5%", "-"]
    nothing = cells.one(task="LaMP-2M", method="base", metric="macro_f1")
    assert nothing["text"].split() == ["-"]
    assert "data-value" not in nothing
    cost = cells.one(task="mean", method="mta", metric="bytes_per_user")
    assert (cost["text"].split(), cost["data-value"]) == (["1,234"], "1234.5")
    known = cells.one(task="mean", method="mta", metric="difference")
    assert known["text"].split() == ["▲", "+0.112", "[+0.010,", "+0.200]", "better,", "holds"]
    assert known["data-holds"] == "true"


def test_texts_of_data_are_escaped_and_nothing_is_fetched() -> None:
    text = report_html(report_case(missing=[HOSTILE]))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6
    tags = Cells(text).tags
    assert {"script", "link", "iframe", "object", "svg"}.isdisjoint(tags)
    sources = re.findall(r'(?:src|href)="([^"]{0,15})', text)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in text
    assert not {"{{", "}}", "{%"} & set(re.findall("[{}%]{2}", text))
    # Of the configuration, which is text, the URL of LaMP's files.
    assert "http" not in text.partition("<pre>")[0].replace("http-equiv", "")
    assert len(re.findall('<img [^>]*alt="[^"]{20,}"', text)) == tags.count("img") == 3
    assert text.count("</figcaption>") == tags.count("img")


def test_three_sentences_a_chart_and_a_table_open_the_page() -> None:
    """What is on the first screen is not folded, all that follows is."""
    first, _, rest = report_html(report_case(lamp_tasks=["LaMP-2M", "LaMP-3"])).partition(
        "</section>"
    )
    ran, came_out, doubts = re.findall("<p>(.*?)</p>", first.partition("<figure>")[0], re.DOTALL)
    assert ran.startswith(
        "2 methods on LaMP-2M, LaMP-3, seed 0, answered 15 queries of 5 groups of"
    )
    assert " ".join(came_out.split()).startswith("On the mean of 2 LaMP tasks the best method is ")
    assert doubts == (
        "What to distrust: the intervals cover sampling of users, not retraining (one seed was "
        "run); intervals of 5 groups of users are too narrow; up to 81% of a method&#39;s answers "
        "are no label."
    )
    assert (first.count("<img"), first.count("<table"), first.count("<details")) == (1, 1, 0)
    assert rest.count("<h2>") == rest.count('<details class="part"><summary><h2>') > 5
    # A chart per LaMP task, a curve and a heat map; of one task the first chart is its own.
    assert rest.count("<figure>") == 4
    assert report_html(report_case()).count("<figure>") == 1 + 2


def test_the_same_data_give_the_same_bytes() -> None:
    assert report_html(report_case()) == report_html(report_case())


def test_what_is_missing_stands_in_a_box() -> None:
    assert 'id="missing"' not in report_html(report_case())
    text = report_html(report_case(missing=["anchor x: failed", "anchor y: failed"]))
    box = text[text.index('id="missing"') :]
    assert "MISSING: 2 pieces" in box
    assert "<li>anchor y: failed</li>" in box


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (None, ("-", "no number", "open")),
        (difference(0.1, None, None, None), ("○ +0.100", "no interval", "open")),
        (difference(0.1, -0.1, 0.3, False), ("○ +0.100", "not shown", "open")),
        (difference(0.1, 0.0, 0.3, False), ("○ +0.100", "not shown", "open")),
        (difference(0.0, 0.0, 0.0, False), ("=", "same score", "open")),
        (difference(0.1, 0.05, 0.3, True), ("▲ +0.100", "better, holds", "up")),
        (difference(-0.1, -0.3, -0.05, True), ("▼ -0.100", "worse, holds", "down")),
    ],
)
def test_differences_in_words(one: Any, expected: tuple[str, str, str]) -> None:
    """The sign and the number, the words below it, and the class that colours it."""
    data = report_case()
    data.overall.differences["mta"] = {"base": {"score": one}} if one else {}
    assert shown_difference(data) == expected
    data.identical["mean"] = [["base", "mta"]]
    assert shown_difference(data) == ("=", "identical answers", "open")


def shown_difference(data: ReportData) -> tuple[str, str, str]:
    """Of mta and base on the mean; the interval between number and words is left out."""
    small = '<span class="small">'
    ((look, number, words),) = re.findall(
        '<td data-task="mean" data-method="mta" data-opponent="base"[^>]*>'
        rf'<span class="(\w+)">([^<]*)</span>(?:{small}\[[^<]*</span>)?{small}([^<]*)</span></td>',
        report_html(data),
    )
    return number.strip(), words, look


def test_the_verdict_is_made_of_the_numbers() -> None:
    data = report_case()
    assert verdict(data) == (
        "On LaMP-2M the best method is <strong>mta</strong> with a score of 0.612 [0.500, 0.700], "
        "12% of the attainable. These differences hold: "
        "<strong>mta</strong> is better than base by 0.112 [0.010, 0.200]."
    )
    data = report_case(lamp_tasks=["LaMP-2M", "LaMP-3"], seeds=[0, 1])
    data.overall.differences["mta"] = {
        "base": {"score": difference(-0.25, -0.5, -0.125, True)},
        "oppu": {"score": difference(0.01, -0.02, 0.04, False)},
        "merge_only": {"score": difference(0.5, None, None, None)},
    }
    assert verdict(data) == (
        "On the mean of 2 LaMP tasks and 2 seeds the best method is <strong>mta</strong> with a "
        "score of 0.612 [0.500, 0.700], 12% of the attainable. "
        "These differences hold: <strong>mta</strong> is worse than base by 0.250 [0.125, 0.500]. "
        "Not shown to differ: mta and merge_only (+0.500, no interval); "
        "mta and oppu (+0.010 [-0.020, +0.040])."
    )
    # A cell that is missing: the mean is of fewer than tasks times seeds.
    data = with_overall(data, cells=3)
    assert verdict(data).startswith("On the mean of 3 scores the best method is ")
    data.overall.intervals["mta"]["share_of_attainable"] = estimate(-2.4)
    assert "-240% of the attainable: worse than the best answers that ignore who" in verdict(data)


def with_overall(data: ReportData, **changes: Any) -> ReportData:
    return replace(data, overall=data.overall.model_copy(update=changes))


def not_told_apart() -> ReportData:
    """mta is highest: shown to be above base, not above oppu; merge_only is oppu, word for word."""
    data = report_case(methods=["base", "oppu", "merge_only", "mta"])
    data.identical["mean"] = [["oppu", "merge_only"]]
    touches = {"score": difference(0.125, 0.0, 0.292, False)}
    zero = {"score": difference(0.0, 0.0, 0.0, False)}
    data.overall.intervals.update(
        {name: {"score": estimate(0.48734, 0.4, 0.5)} for name in ("oppu", "merge_only")}
    )
    base = {"score": difference(0.25, 0.1, 0.4, True)}
    data.overall.differences.clear()
    data.overall.differences["mta"] = {"base": base, "oppu": touches, "merge_only": touches}
    data.overall.differences["merge_only"] = {"base": zero, "oppu": zero}
    return data


def test_nobody_is_best_whom_an_interval_does_not_show_to_be() -> None:
    data = report_case()
    assert leaders(data.overall) == leaders(data.means["LaMP-2M"]) == ["mta"]
    data = not_told_apart()
    assert leaders(data.overall) == ["oppu", "merge_only", "mta"]
    assert verdict(data) == (
        "On LaMP-2M no method is shown to be the best: "
        "<strong>oppu</strong> (0.487 [0.400, 0.500]), "
        "<strong>merge_only</strong> (0.487 [0.400, 0.500]) and "
        "<strong>mta</strong> (0.612 [0.500, 0.700]) are not told apart. "
        "oppu and merge_only gave identical answers to all 15 queries. "
        "These differences hold: <strong>mta</strong> is better than base by 0.250 [0.100, 0.400]. "
        "Not shown to differ: mta and merge_only (+0.125 [+0.000, +0.292]); "
        "merge_only and base (the same score for every group of users); "
        "mta and oppu (+0.125 [+0.000, +0.292])."
    )
    # In the table the same methods are bold.
    cells = Cells(report_html(data))
    looks = {m: cells.one(task="mean", method=m, metric="score")["class"] for m in data.methods}
    assert looks == {"base": "mean"} | dict.fromkeys(("oppu", "merge_only", "mta"), "mean best")
    data.overall.intervals.clear()
    assert verdict(data).startswith("Nothing was scored. oppu and merge_only gave")


def test_each_pair_stands_once_in_one_matrix() -> None:
    cells = Cells(report_html(not_told_apart())).found
    pairs = {
        (cell["data-method"], cell["data-opponent"]): " ".join(cell["text"].split())
        for cell in cells
        if cell.get("data-metric") == "difference" and cell["data-task"] == "mean"
    }
    assert pairs == {
        ("oppu", "base"): "- no number",
        ("merge_only", "base"): "= same score",
        ("merge_only", "oppu"): "= identical answers",
        ("mta", "base"): "▲ +0.250 [+0.100, +0.400] better, holds",
        ("mta", "oppu"): "○ +0.125 [+0.000, +0.292] not shown",
        ("mta", "merge_only"): "○ +0.125 [+0.000, +0.292] not shown",
    }
    # One LaMP task and its mean are the same: one matrix.
    assert {cell["data-task"] for cell in cells if "data-opponent" in cell} == {"mean"}
    data = not_told_apart()
    data.means["LaMP-3"] = data.means["LaMP-2M"]
    data.identical["LaMP-3"] = []
    folded = report_html(data).split("Per LaMP task</summary>")[1]
    assert 'data-task="LaMP-3" data-method="mta" data-opponent="base"' in folded


def test_bars_show_the_score_also_of_ratings() -> None:
    """MAE .25 is a score of 1 - .25 / 4 = .9375: a longer bar is better in every chart."""
    data = report_case()
    scores = {
        "base": {"mae": estimate(0.25), "score": estimate(0.9375, 0.875, 1.0)},
        "mta": {"mae": estimate(None), "score": estimate(None)},
    }
    data.means["LaMP-3"] = data.means.pop("LaMP-2M").model_copy(update={"intervals": scores})
    data.identical["LaMP-3"] = []
    data.curve.clear()
    expected = "LaMP-3, score = 1 - MAE / 4 by method: base 0.938 MAE 0.250 from 0.875 to 1.000; "
    text = report_html(data)
    assert f'alt="{expected}mta - MAE -"' in text
    # In the table the least MAE is the best.
    assert Cells(text).one(task="LaMP-3", method="base", metric="mae")["class"] == "best"


def test_answers_that_are_no_label_stand_beside_the_score() -> None:
    text = report_html(report_case())
    cells = Cells(text)
    shown = cells.one(task="LaMP-2M", method="base", metric="accuracy")
    assert shown["text"].split() == ["0.500", "[0.400,", "0.625]", "81%", "no", "label"]
    assert "label" not in cells.one(task="LaMP-2M", method="mta", metric="accuracy")["text"]
    share = cells.one(task="LaMP-2M", method="base", metric="no_label")
    assert (share["text"].split(), share["data-value"]) == (["81.2%"], "0.8125")
    assert cells.one(task="LaMP-2M", method="bayes", metric="no_label")["text"].split() == ["-"]
    # Escaped, empty, and cut to 80 letters.
    (listed,) = re.findall("<ul class=.notes.>(<li>.*?)</ul></td>", text)
    hostile = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    hostile = hostile.replace('"', "&#34;")
    assert listed == (
        f"<li>{hostile}: <q>{hostile}</q></li><li>q2: <em>empty</em></li>"
        f"<li>q3: <q>{'word ' * 15}w ...</q></li>"
    )
    assert len("word " * 15 + "w ...") == 80
    assert "no label" not in report_html(report_case(no_label=[], table=[]))


def test_a_share_below_0_is_explained() -> None:
    text = report_html(report_case())
    assert "below 0 is worse than the best answers that ignore who asks" in text


def test_seeds_are_folded_and_marked() -> None:
    alone = report_case().means
    alone["LaMP-2M"].intervals["mta"]["accuracy"] = estimate(0.125)
    text = report_html(report_case(by_seed={7: alone}))
    assert "Main metric with seed 7" in text
    seeded = Cells(text).one(task="LaMP-2M", method="mta", metric="accuracy", seed="7")
    assert seeded["data-value"] == "0.125"


def test_no_two_methods_look_alike() -> None:
    """Those of every run have a colour each; another one may have a colour again."""
    usual = [name for name, method in METHODS.items() if method.default]
    assert len({style(name)[0] for name in usual}) == len(usual)
    assert (
        len(set(map(style, METHODS))) == len({style(name)[1] for name in METHODS}) == len(METHODS)
    )
