"""Stage 1: read and check users, split them by author, and write them as parquet."""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.files import file_sha256
from tasks.lamp.dataset import write_dataset
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import of_task
from tasks.lamp.formats import copy_users
from tasks.lamp.kept import UNKNOWN_GOLD, UNKNOWN_LABEL
from tasks.lamp.options import SplitOptions, SyntheticOptions
from tasks.lamp.synthetic import World
from tasks.lamp.synthetic.optimum import optimal_answers
from tasks.lamp.synthetic.world import Taste
from tasks.log import log
from tasks.methods import METHODS
from tasks.results.models import Prepared, SourceFiles
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.progress import Progress

OPTIMUM_FILE = "optimum.parquet"
POPULATION_FILE = "population.parquet"
SPLITS = {"grouped": "split by author", "published": "split by user, as published"}
# Counts that the log has if they are not 0.
LOGGED = (
    "queries_in_other_profiles", "pooled_users", "removed_shared_group",
    "removed_few_shot_without_query", "few_shot_users_left_out", "unseen_few_shot_items",
    "shared_author", "base_users_as_candidates",
    "papers_asked_by_their_author", "papers_asked_by_a_drawn_citation",
)  # fmt: skip
MEGABYTE = 10**6


def prepared_users(config: TaskConfig) -> Prepared:
    """The users of a cell. Logs what was read, dropped and split.

    Raises InputError, before anything is trained, if a method would have no anchor.
    """
    users = prepare(source(config), config.split, config.task, config.seed)
    for line in described(users, config.split.kind):
        log(f"{config.lamp_task}: {line}")
    # Whether whole clusters have enough items is checked when there are clusters: tasks/anchors.py.
    single = [
        method
        for method in config.methods
        if METHODS[method].merged and config.method(method).anchors.train_on == "user"
    ]
    least = config.anchors.min_items
    if single and not config.bank.adapters and users.longest_candidate < least:
        with naming_dropped(users.dropped, config.task):
            raise InputError(
                f"{config.data}: no anchor candidate has anchors.min_items {least} items or more, "
                f"the longest history has {users.longest_candidate}, and anchors of "
                f"{', '.join(single)} are single users; lower it, give longer histories, or leave "
                "such methods out"
            )
    return users


@stage(version=11, libraries=("polars", "pyarrow", "numpy"))
def prepare(
    users: SourceFiles | SyntheticOptions, split: SplitOptions, task: LampTask, seed: int
) -> Prepared:
    """Users of one LaMP task on three sides. users: files, or the world to generate.

    Raises InputError if the files change while they are read, or no users are left.
    """
    generated = isinstance(users, SyntheticOptions)
    # The best answers are known for few-shot users, not for the candidates that development scores.
    known = generated and not split.development
    with store().new("prepare") as folder, tempfile.TemporaryDirectory() as scratch:
        if isinstance(users, SyntheticOptions):
            place, world = Path(scratch) / "users", World(task.name, users, seed)
            world.write(place)
            if known:
                best = optimal_answers(world, split.few_shot_items)
                best.write_parquet(folder.path / OPTIMUM_FILE)
            _population(world.tastes()).write_parquet(folder.path / POPULATION_FILE)
        else:
            place = Path(users.path)
        # Texts may be gigabytes, so they stay on disk: to split users, keys are enough.
        everyone = folder.path / "everyone.arrow"
        copied = copy_users(place, task, everyone, seed)
        dropped = Counter(copied.dropped)
        with naming_dropped(dropped, task):
            made = write_dataset(everyone, dropped, split, task, seed)
        # The key holds the files' hashes, but the files may have changed since.
        if isinstance(users, SourceFiles) and hashes(place) != users.files:
            raise InputError(
                f"data: {place} changed while it was read, so nothing is made of it; start "
                "the run again when it stays"
            )
    drawn = {"papers_asked_by_a_drawn_citation": copied.drawn} if copied.drawn else {}
    return Prepared(
        task=task,
        base=folder.file("base.parquet"),
        anchor=folder.file("anchor.parquet"),
        few_shot=folder.file("few_shot.parquet"),
        pooled=folder.file("pooled.parquet"),
        optimum=folder.file(OPTIMUM_FILE) if known else None,
        population=folder.file(POPULATION_FILE) if generated else None,
        few_shot_ids=made.few_shot_ids,
        instruction=made.instruction,
        longest_candidate=made.longest_candidate,
        counts=made.counts | drawn,
        dropped=+dropped,
        audit=made.audit,
    )


def source(config: TaskConfig) -> SourceFiles | SyntheticOptions:
    """The files to read users from, or the world to generate."""
    if config.data == "synthetic":
        return config.synthetic
    if config.data == "lamp":
        place = _downloaded(config)
    else:
        place = of_task(Path(config.data).expanduser(), config.lamp_task)
    return SourceFiles(path=str(place.absolute()), files=hashes(place))


def _downloaded(config: TaskConfig) -> Path:
    """The folder of LaMP's own files, downloaded if the cache lacks them."""
    from tasks.lamp.download import official_files

    bars: dict[str, Progress] = {}

    def show(name: str, done: int, total: int | None) -> None:
        # If the server does not say how much comes, expect one MB more than has come.
        whole = math.ceil((done + MEGABYTE if total is None else total) / MEGABYTE)
        if name not in bars:
            bars[name] = Progress("download", f"{config.lamp_task}: MB of {name}", whole)
        bars[name].update(math.ceil(done / MEGABYTE), whole)

    return official_files(config.lamp_task, config.lamp, log, show)


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of each user file in a folder, or of the file `folder` itself."""
    files = [folder]
    if folder.is_dir():
        # Per-Pcs and MTA keep their few-shot users in a folder of their own.
        patterns = ("*.json", "*.jsonl", "test_100/*.json", "test_100/*.jsonl")
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files if file.exists()}


def _population(tastes: Mapping[str, Taste]) -> pl.DataFrame:
    """user_id, first, second (archetypes), mixture of every user of a generated world."""
    rows = [(user_id, one.first, one.second, one.mixture) for user_id, one in tastes.items()]
    return pl.DataFrame(rows, ["user_id", "first", "second", "mixture"], orient="row")


@contextmanager
def naming_dropped(dropped: Mapping[str, int], task: LampTask) -> Iterator[None]:
    """Put what was dropped, by reason, before an InputError raised inside: that may be why.

    If labels were unknown, the line ends with the task's labels. It does not show what the file
    has instead, which may be a user's text.
    """
    try:
        yield
    except InputError as error:
        if not (counted := _counted(dropped)):
            raise
        hint = ""
        if UNKNOWN_LABEL in dropped or UNKNOWN_GOLD in dropped:
            hint = (
                f"; {task.name} takes the labels {', '.join(task.labels)}: "
                "a task with labels of its own cannot run under this name"
            )
        raise InputError(f"dropped {counted}: {error}{hint}") from None


def _counted(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in dropped.items() if count)


def described(users: Prepared, kind: str) -> list[str]:
    """Lines: what was read, how it was split (kind: `split.kind`), what was left out."""
    counts, audit = users.counts, users.audit
    lines = [
        f"{counts['users']} users by {counts['groups']} authors; {SPLITS[kind]}: "
        f"{counts['base_users']} base users, {counts['anchor_candidates']} anchor candidates, "
        f"{counts['few_shot_users']} few-shot users by {counts['few_shot_groups']} authors "
        f"with {counts['queries']} queries"
    ]
    lines += [f"{name.replace('_', ' ')}: {counts[name]}" for name in LOGGED if counts.get(name)]
    if audit["groups"]["few_shot"].keys() - {"1"}:
        sizes = [f"{count} of {size}" for size, count in audit["groups"]["few_shot"].items()]
        lines.append(f"few-shot authors by their number of users: {', '.join(sizes)}")
    asked = audit["queries"]["few_shot"]
    if (places := asked["text"])["any"]:
        lines.append(
            f"queries whose text stands in a profile: {places['any']} of {asked['asked']} "
            f"({places['own']} in the user's own, {places['sibling']} in another of the author's, "
            f"{places['other']} in another author's), with the gold answer: "
            f"{asked['text_and_answer']['any']}"
        )
    if (repeated := audit["duplicates"])["repeated_texts"]:
        lines.append(
            f"texts that stand in several profiles: {repeated['repeated_texts']} of "
            f"{repeated['texts']}; texts with several answers: "
            f"{repeated['texts_with_several_answers']}"
        )
    if golds := audit["labels"]["golds"]:
        lines.append(
            f"always answering {golds['majority']!r} is right for {golds['majority_share']:.1%} "
            f"of the queries (entropy of the golds: {golds['entropy_bits']:.2f} bits)"
        )
    return [*lines, f"dropped: {_counted(users.dropped) or 'nothing'}"]
