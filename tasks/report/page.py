"""report.html: one self-contained page of a run's results, made by `templates`.

The templates escape texts that come from data. Of such texts the page shows methods' answers alone,
nothing that a user wrote.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.compare import mean_of
from tasks.config.run import RunConfig
from tasks.errors import label, printable
from tasks.lamp.metrics import unlabelled
from tasks.methods import METHODS
from tasks.record import File
from tasks.report.charts import LINES, bars, curves, gaps, heat, style
from tasks.report.chosen import Chosen, chosen_by_merging
from tasks.report.notes import BELOW_ZERO, SAME, alike, claims, distrust, identical, none_at_all
from tasks.report.since import Since
from tasks.report.table import Row
from tasks.results.models import Compared
from tasks.results.run import Cell, Run
from tasks.results.store import store

EXAMPLES = 3


@dataclass(frozen=True)
class NoLabel:
    """Answers of a method in a cell that are no label: query id and answer of the first few."""

    cell: str
    method: str
    share: float
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class ReportData:
    """What the templates get.

    methods, references: those scored, in the order of tables. means: LaMP task -> mean over the
    run's seeds. by_seed: of several seeds, seed -> LaMP task. identical: LaMP task, or "mean" ->
    groups of methods that answered alike. curve: LaMP task -> number of items -> mean over seeds.
    table: `table.rows` of all cells.
    """

    run: Run
    config: RunConfig
    overall: Compared
    methods: list[str]
    references: list[str]
    means: dict[str, Compared]
    by_seed: dict[int, dict[str, Compared]]
    identical: dict[str, list[list[str]]]
    no_label: list[NoLabel]
    curve: dict[str, dict[int, Compared]]
    chosen: list[Chosen]
    table: list[Row]
    notes: list[str]
    since: Since | None

    def row_mean(
        self, column: str, method: str, task: str = "mean", seed: int | None = None
    ) -> float | None:
        """The mean of a column over a method's rows; None if no row has it."""
        rows = [row for row in self.table if row["method"] == method and column in row]
        if task != "mean":
            rows = [row for row in rows if row["lamp_task"] == task]
        if seed is not None:
            rows = [row for row in rows if row.get("seed") == seed]
        return fmean(row[column] for row in rows) if rows else None


def report_data(run: Run, table: list[Row], notes: list[str], changed: Since | None) -> ReportData:
    """Everything the page shows. Raises InputError when a result is gone from the store."""
    assert run.overall is not None
    config = RunConfig.model_validate(run.config)
    by_task: dict[str, list[Cell]] = {}
    by_seed: dict[int, dict[str, Compared]] = {}
    for cell in run.cells:
        by_task.setdefault(cell.config.lamp_task, []).append(cell)
        if cell.config.several_seeds:
            by_seed.setdefault(cell.config.seed, {})[cell.config.lamp_task] = cell.compared
    means = {task: mean_of([cell.compared for cell in cells]) for task, cells in by_task.items()}
    scored = {name for mean in means.values() for name in mean.methods}
    return ReportData(
        run=run,
        config=config,
        overall=run.overall,
        methods=[name for name in METHODS if name in scored],
        references=[name for name in LINES if name in scored],
        means=means,
        by_seed=by_seed,
        identical={"mean": identical(run.cells)}
        | {task: identical(cells) for task, cells in by_task.items()},
        no_label=[one for cell in run.cells for one in no_labels(cell)],
        curve={task: _curve(config, cells, means[task]) for task, cells in by_task.items()},
        chosen=[one for cell in run.cells for one in chosen_by_merging(cell)],
        table=table,
        notes=notes,
        since=changed,
    )


def no_labels(cell: Cell) -> list[NoLabel]:
    """For each method with answers that are no label, the first of these by query id."""
    methods = []
    for one in cell.compared.scored:
        if one.no_label:
            table = pl.read_parquet(store().path(one.predictions))
            answers: dict[str, str] = dict(table.select("query_id", "prediction").iter_rows())
            ids = unlabelled(cell.users.task, answers, cell.compared.rules)[:EXAMPLES]
            examples = [(query_id, answers[query_id]) for query_id in ids]
            methods.append(NoLabel(cell.name, one.method, one.no_label, examples))
    return methods


def _curve(config: RunConfig, cells: Sequence[Cell], main: Compared) -> dict[int, Compared]:
    """Number of items -> the mean over cells. A number that a cell lacks is left out."""
    points = {
        items: mean_of([cell.curve[items] for cell in cells])
        for items in config.items_curve
        if all(items in cell.curve for cell in cells)
    }
    # The tables' scores are a point of the curve, too, if their number of items is known.
    if points and config.split.few_shot_items is not None:
        points[config.split.few_shot_items] = main
    return dict(sorted(points.items()))


def report_html(data: ReportData) -> str:
    """The page. The same data give the same bytes."""
    doubts = distrust(data.run, data.config, data.table, data.overall.groups)
    return _rendered("report.html.jinja", data, ran=what_ran(data), distrust=doubts)


def verdict(data: ReportData) -> Markup:
    """One paragraph made of the numbers, as HTML: what is best, and which differences hold."""
    return Markup(" ".join(_rendered("verdict.html.jinja", data).split()))


def what_ran(data: ReportData) -> str:
    """One sentence: methods, LaMP tasks, seeds, users, data and model."""
    config, mean = data.config, data.overall
    tasks, seeds = ", ".join(data.means), ", ".join(map(str, config.all_seeds))
    return (
        f"{len(data.methods)} methods on {tasks}, seed {seeds}, answered "
        f"{mean.queries:,} queries of {mean.groups:,} groups of users: data {config.data}, preset "
        f"{config.preset}, base model {config.base.model}."
    )


def run_summary(data: ReportData) -> tuple[str, str]:
    """Two lines of plain text, for places without a page: what ran, and what came out."""
    return what_ran(data), verdict(data).striptags()


def leaders(mean: Compared) -> list[str]:
    """The method with the highest `score`, and those not shown to be below it, in METHODS' order.

    If it is alone, it is the best: its difference to every other method holds.
    """
    known = [(name, mean.estimate(name).point) for name in METHODS]
    scores = {name: point for name, point in known if point is not None}
    top = max(scores, key=lambda name: scores[name], default="")
    below = [name for name, one in mean.differences.get(top, {}).items() if one["score"].holds]
    return [name for name in scores if name not in below]


def primary(compared: Compared) -> str:
    """The main metric of what was compared."""
    known = {name for metrics in compared.intervals.values() for name in metrics}
    return next(name for name in ("accuracy", "mae", "rougeL") if name in known)


def png(file: File) -> str:
    """A picture of the store as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(store().path(file).read_bytes()).decode()}"


def _rendered(name: str, data: ReportData, **sentences: str) -> str:
    template = templates().get_template(name)
    return template.render(vars(data), row_mean=data.row_mean, **sentences)


@cache
def templates() -> Environment:
    """The templates of this folder. A name that a template lacks is an error."""
    environment = Environment(
        loader=PackageLoader("tasks.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"label": label, "printable": printable}
    functions = (alike, bars, claims, curves, gaps, heat, leaders, none_at_all, png, primary, style)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"BELOW_ZERO": BELOW_ZERO, "LINES": LINES, "SAME": SAME}
    return environment
