"""What a reader of the numbers must know: lines below the table and on the page."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.config.run import RunConfig
from tasks.lamp.metrics import remarks
from tasks.report.table import Row
from tasks.results.models import Compared, Difference
from tasks.results.run import Cell, Run
from tasks.text.loading import model_name

# The method's claims, on the mean over LaMP tasks. The last two are against untrained methods.
CLAIMS = (
    ("mta", "merge_only"), ("merge_only", "base"), ("mta", "oppu"), ("mta", "base"),
    ("mta", "commonest"), ("mta_prior", "base_prior"),
)  # fmt: skip
SAME = "the same score for every group of users"
# Above this share of answers that are no label, a line says what helps.
MANY = 0.2
# Intervals of fewer groups are too narrow (Cameron, Gelbach and Miller 2008: from five to thirty).
FEW = 20
# Beside any share of the attainable that is below 0.
BELOW_ZERO = (
    "A share of the attainable below 0 is worse than the best answers that ignore who asks "
    "(nonpersonal); far below 0, the model has not learned the task"
)
# A note for each of these counts that is known and not 0.
COUNT_NOTES = {
    "shared_author": "{shared_author} base users or anchor candidates share an author with a "
    "user on another side (split.kind=published divides users, not authors)",
    "papers_asked_by_their_author": "no paper names a citation; {papers_asked_by_their_author} "
    "papers were asked against another author's paper instead",
    "papers_asked_by_a_drawn_citation": "{papers_asked_by_a_drawn_citation} papers name several "
    "citations; the seed drew one of each",
    "fewer_authors": "the {few_shot_users} few-shot users come from {few_shot_groups} authors",
    "queries_in_other_profiles": "the texts of {queries_in_other_profiles} of {queries} queries "
    "stand in the profile of a base user or anchor candidate too",
}


def data_lines(config: RunConfig) -> list[str]:
    """What must be known of the data, from the configuration alone."""
    if config.data != "synthetic" or config.base.model == "tiny":
        return []
    model = model_name(config.base.model)
    return [
        "data=synthetic: the users are generated, of words that mean nothing to the model "
        f"{model}; give data=FOLDER or data=lamp"
    ]


def run_notes(run: Run) -> list[str]:
    """What must be known of a run's numbers: its data, its LoRAs, the spread of its seeds."""
    lines = data_lines(RunConfig.model_validate(run.config))
    lines += [line for cell in run.cells for line in cell_notes(cell)]
    return lines + coverage_notes(run.cells) + seed_lines(run.cells)


def coverage_notes(cells: Sequence[Cell]) -> list[str]:
    """Which layers the LoRAs are on: each line once, with its LaMP tasks if it is not of all."""
    tasks: dict[str, list[str]] = {}
    for cell in cells:
        for line in cell.coverage:
            tasks.setdefault(line, []).append(cell.config.lamp_task)
    everyone = {cell.config.lamp_task for cell in cells}
    return [
        line if {*names} == everyone else f"{', '.join(dict.fromkeys(names))}: {line}"
        for line, names in tasks.items()
    ]


def cell_notes(cell: Cell) -> list[str]:
    """Notes on a cell: what was dropped, too few anchors, answers that are no label."""
    lines = [f"{cell.name}: dropped {count} x {what}" for what, count in cell.users.dropped.items()]
    lines += [f"{cell.name}: {cell.tuning.text()}"] if cell.tuning else []
    for merging in cell.mergings:
        head, chosen = f"{cell.name}, {merging.methods[0]}", merging.chosen
        if chosen is None:
            count = len(merging.merged.bank.members)
            lines.append(f"{head}: the bank is {count} given adapters; no anchor was trained")
        elif 0 < chosen.single_users < chosen.asked:
            alone = chosen.single_users
            lines.append(f"{head}: {alone} users as anchors of {chosen.asked} asked")
    # All methods are scored by the same rules, against the same golds.
    said = remarks(cell.compared.rules, cell.compared.golds_without_token)
    counts = cell.users.counts
    few = counts["few_shot_groups"] < counts["few_shot_users"]
    known = counts | {"fewer_authors": int(few)}
    said += [text.format_map(known) for name, text in COUNT_NOTES.items() if known.get(name)]
    return lines + [f"{cell.name}: {line}" for line in [*_no_label_lines(cell), *said]]


def _no_label_lines(cell: Cell) -> list[str]:
    """What helps if more than MANY of a method's answers are no label."""
    shares = {one.method: one.no_label or 0.0 for one in cell.compared.scored}
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > MANY)
    if not listed:
        return []
    rating = cell.users.task.kind == "rating"
    wrong = "so taken as 1 or 5, whichever is farther off" if rating else "so wrong"
    helps = "scoring.answer=likelihood chooses among the labels"
    if cell.base.adapter is None:
        helps += ", base.task_adapt.enabled=true teaches them"
    return [f"answers that are no label, {wrong}: {listed}; {helps}"]


def share_lines(table: Iterable[Row]) -> list[str]:
    """What a share of the attainable below 0 means, if a method has one."""
    return [BELOW_ZERO] if any((row.get("share_of_attainable") or 0) < 0 for row in table) else []


def seed_lines(cells: Iterable[Cell]) -> list[str]:
    """How far seeds lie apart. No interval covers that: each seed trained its own model.

    Means over LaMP tasks, of each seed that scored all of them; nothing if that is one seed.
    """
    by_seed: dict[int, dict[str, Compared]] = {}
    for one in cells:
        by_seed.setdefault(one.config.seed, {})[one.config.lamp_task] = one.compared
    every = max(by_seed.values(), key=len, default={}).keys()
    by_seed = {seed: tasks for seed, tasks in by_seed.items() if tasks.keys() == every}
    if len(by_seed) < 2:
        return []

    def means(method: str, metric: str = "score") -> NDArray[np.float64]:
        """One number per seed; nan if a cell has none."""
        seeds = [tasks.values() for tasks in by_seed.values()]
        points = [[one.estimate(method, metric).point for one in compared] for compared in seeds]
        table: NDArray[np.float64] = np.array(points, dtype=np.float64)
        return np.asarray(table.mean(axis=1))

    figures = [(f"mean score, {a} - {b}", "+.4f", means(a) - means(b)) for a, b in CLAIMS]
    figures.append(("share of the attainable, mta", ".3f", means("mta", "share_of_attainable")))
    head = f"by seed ({', '.join(map(str, by_seed))}), which no interval contains"
    return [
        f"{head}: {what}: {', '.join(format(value, form) for value in values)}"
        for what, form, values in figures
        if np.isfinite(values).all()
    ]


def distrust(run: Run, config: RunConfig, table: Iterable[Row], groups: int) -> str:
    """What limits the numbers most, in one sentence.

    table: the rows of all cells. groups: of users, in all cells.
    """
    trained = "one seed was run" if len(config.all_seeds) == 1 else "the notes compare the seeds"
    said = [f"the intervals cover sampling of users, not retraining ({trained})"]
    if config.data == "synthetic":
        tiny = " and the base model is tiny" if config.base.model == "tiny" else ""
        said.append(f"the users are generated{tiny}")
    if groups < FEW:
        said.append(f"intervals of {groups} groups of users are too narrow")
    most = max((row.get("no_label") or 0 for row in table), default=0)
    if most > MANY:
        said.append(f"up to {most:.0%} of a method's answers are no label")
    if run.missing:
        said.append(f"{len(run.missing)} pieces are missing")
    return f"What to distrust: {'; '.join(said)}."


def difference_lines(mean: Compared, groups: Sequence[Sequence[str]]) -> list[str]:
    """What is better than what, on the mean, and whether that holds.

    groups: methods that answered alike (`identical`).
    """
    verdicts = {True: "holds", False: "not shown", None: "has no interval"}
    lines = []
    for method, opponent, one in claims(mean):
        words = SAME if none_at_all(one) else f"{one.text('+.4f')} {verdicts[one.holds]}"
        if alike(groups, method, opponent):
            words = f"identical answers to all {mean.queries:,} queries"
        lines.append(f"mean score, {method} - {opponent}: {words}")
    return lines


def claims(mean: Compared) -> list[tuple[str, str, Difference]]:
    """Method, opponent, difference of `score`, for the CLAIMS whose methods were run."""
    return [
        (method, opponent, metrics["score"])
        for method, opponent in CLAIMS
        if (metrics := mean.differences.get(method, {}).get(opponent))
    ]


def none_at_all(difference: Difference) -> bool:
    """Whether a difference is 0 in every draw: no group of users tells the two apart."""
    return difference.point == difference.lo == difference.hi == 0


def identical(cells: Sequence[Cell]) -> list[list[str]]:
    """Groups of methods that gave the same answers to all queries of all these cells."""
    # By the files' hashes: all answers together may not fit into memory.
    tables = [{one.method: one.predictions.sha256 for one in c.compared.scored} for c in cells]
    groups: dict[tuple[str, ...], list[str]] = {}
    for method in tables[0]:
        if all(method in table for table in tables):
            groups.setdefault(tuple(table[method] for table in tables), []).append(method)
    return [group for group in groups.values() if len(group) > 1]


def alike(groups: Sequence[Sequence[str]], method: str, other: str) -> bool:
    """Whether both are in one of the groups of `identical`."""
    return any(method in group and other in group for group in groups)
