"""The command `mta`: runs and their plans, users and their models. Bad input: one line, code 2."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from infra import command
from infra.local.settings import TELEMETRY_OFF
from tasks.errors import InputError, label, masked

app = typer.Typer(name="mta", rich_markup_mode=None, help=__doc__)
Parameters = Annotated[
    list[str] | None,
    typer.Option("-p", "--param", metavar="NAME=VALUE", help="a field of the configuration"),
]
RunName = Annotated[str, typer.Option("--run", help="a run's name, id or file")]


@app.command()
def run(param: Parameters = None) -> int:
    """Run the benchmark here, without the stack's servers.

    It runs in this process, with a Prefect server of its own, and MLflow in a file. A terminal
    shows a row for each LaMP task and seed: its stage, how far that is, and how many results were
    found and made. Exit code 0: nothing is missing.
    """
    from infra.local.alone import run_alone
    from tasks.live import live_view

    with live_view():
        return run_alone(param or [])


@app.command()
def plan(param: Parameters = None) -> int:
    """Say what a run would take: steps, FLOPs, memory, hours, disk. Nothing is trained."""
    return run([*(param or []), "dry_run=true"])


LampTask = Annotated[
    str | None, typer.Option("--task", "--lamp-task", help="default: the run's first")
]
Seed = Annotated[int | None, typer.Option(help="default: the run's first")]
BankName = Annotated[
    str, typer.Option("--run", help="a run's name, id or file, or models:/mta-bank/VERSION")
]
BaseFolder = Annotated[
    str | None, typer.Option("--base", help="the base model here; default: where the run had it")
]


@app.command()
def export(
    to: Annotated[Path, typer.Option(help="the folder to write, a new one")],
    user: Annotated[str | None, typer.Option(help="a few-shot user's id")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="all few-shot users, for vLLM")] = False,
    form: Annotated[
        Literal["peft", "vllm", "merged"],
        typer.Option("--format", help="a LoRA, all users' for vLLM, or a whole model"),
    ] = "peft",
    rank: Annotated[int, typer.Option(help="vllm: the most; larger LoRAs are cut")] = 16,
    tolerance: Annotated[float | None, typer.Option(help="vllm: the most that is lost")] = None,
    base: Annotated[str | None, typer.Option(help="vllm: the model that is served")] = None,
    lamp_task: LampTask = None,
    method: str = "mta",
    seed: Seed = None,
    run: RunName = "last",
) -> int:
    """Write users' LoRAs as PEFT folders, or as a whole model.

    A user's LoRA is the merged one and the stacked one, as one. --all --format vllm: a folder for
    every user, as vLLM finds them. Exit code 2: somebody was left out, and is named.
    """
    from tasks.export import Finished, max_lora_rank, merged_model, vllm_folders
    from tasks.export import export as write
    from tasks.report.files import read_run, shown_run
    from tasks.text.loading import model_name

    if everyone != (form == "vllm") or everyone == bool(user):
        raise InputError("give --user ID, or --all with --format vllm")
    finished = Finished(read_run(run), lamp_task, method, seed)
    if user is None:
        made = vllm_folders(finished, to, rank, tolerance, base)
        code = _print_all(
            one
            if isinstance(one, InputError)
            else f"{one.folder}: {label(one.user)}, {one.error:.2%} of the update lost"
            for one in made
        )
        print(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=lora_filesystem_resolver "
            f"VLLM_LORA_RESOLVER_CACHE_DIR={to.absolute()} vllm serve "
            f"{base or model_name(finished.cell.base.model)} --enable-lora "
            f"--max-lora-rank {max_lora_rank(rank)}"
        )
        return code
    task = finished.cell.config.lamp_task
    what = f"of {label(user)} by {method} for {task}, from {shown_run(finished.run)}"
    if form == "merged":
        merged_model(finished, user, to)
        print(f"{to}: the model {what}")
        return 0
    model = write(finished, user, to)
    print(f"{to}: the LoRA {what}; its base model is {model}")
    return 0


def _print_all(lines: Iterable[str | InputError]) -> int:
    """Print what was made, and say what could not be; the exit code."""
    code = 0
    for line in lines:
        if isinstance(line, InputError):
            command.say(str(line))
            code = 2
        else:
            print(line, flush=True)
    return code


@app.command()
def personalise(
    user: Annotated[Path, typer.Option(help="a user file: JSON or JSON Lines, without queries")],
    to: Annotated[Path, typer.Option(help="a folder")] = Path("personalised"),
    run: BankName = "last",
    lamp_task: LampTask = None,
    keep: Annotated[
        Literal["folder", "recipe"], typer.Option(help="PEFT folders, or recipes as JSON alone")
    ] = "folder",
    method: str = "mta",
    seed: Seed = None,
    base: BaseFolder = None,
) -> int:
    """Give new users their LoRAs, from the bank of a finished run.

    They go by the users' histories. A PEFT folder for each user of the file. Exit code 2: somebody
    was left out, and is named.
    """
    from tasks.export import Finished
    from tasks.personalise.new_users import personalise as make
    from tasks.tracking.taken_run import run_of

    finished = Finished(run_of(run, base), lamp_task, method, seed)
    return _print_all(make(finished, user, to, keep))


@app.command()
def ask(
    text: Annotated[str, typer.Argument(help="as the input of a query, or its last part")],
    user: Annotated[str, typer.Option(help="a few-shot user's id, or a file of one user")],
    run: BankName = "last",
    lamp_task: LampTask = None,
    compare: Annotated[bool, typer.Option("--compare", help="base and merged, too")] = False,
    method: str = "mta",
    seed: Seed = None,
    base: BaseFolder = None,
) -> None:
    """Ask one user's model, as the run asked its queries."""
    from tasks.export import Finished
    from tasks.personalise.ask import ask as answers
    from tasks.tracking.taken_run import run_of

    finished = Finished(run_of(run, base), lamp_task, method, seed)
    for name, answer in answers(finished, user, text, compare).items():
        print(f"{name:8} {answer}" if compare else answer)


@app.command()
def forget(
    user: Annotated[str, typer.Argument(help="the user's id")],
    data: Annotated[Path | None, typer.Option(help="users' files that no run remembers")] = None,
    store: Annotated[
        str | None, typer.Option(help="a folder or URL; default: MTA_STORE, else .mta/store")
    ] = None,
) -> int:
    """Remove a user and all that was made of the user's texts.

    A search proves it. Removed from the store: what holds the user's id or a text of the user's;
    every LoRA and tiny base model that was trained on the user's items, and all that was made with
    these; what names nobody (tokens, maps, draws), since nothing tells whose it is. Removed beside
    it: reports and runs that name any of it, and the id in logs. In MLflow: artifacts and names. In
    Prefect: the flow runs. What others lose with it is computed again by their next run, from their
    data.

    The file the user came from is not touched: it is named, and the user is back after the next run
    where it still holds the user. Exit code 0: nothing is left; 1: something is, and is said; 2: no
    such user.
    """
    from tasks.forget.user import forget as remove
    from tasks.results.store import store as store_of

    done, left = remove(store_of(store), user, data)
    for line in done:
        print(f"mta: {line}")
    for line in left:
        command.say(f"LEFT: {line}")
    return 1 if left else 0


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="a run's name, id or file")],
    second: Annotated[str, typer.Argument(help="another's, or `last`")] = "last",
) -> None:
    """Compare two runs on the same users, method by method.

    Each difference has its interval. It is printed, with the settings that differ, and written as a
    page beside the runs' reports.
    """
    from tasks.report.files import read_run
    from tasks.report.two_runs import two_runs

    comparison = two_runs(read_run(first), read_run(second))
    print(comparison.text(), end="")
    print(f"mta: the same as a page: {comparison.page()}")


@app.command()
def log(run: Annotated[str, typer.Argument(help="a run's name, id or file")] = "last") -> int:
    """Log a run to MLflow again, where MLflow did not take it.

    MLflow has the run once, however often it is logged. Exit code 1: MLflow does not answer.
    """
    from tasks.errors import transient
    from tasks.report.files import read_run
    from tasks.tracking.runs import log_run, reason
    from tasks.tracking.server import known_mlflow

    finished, mlflow = read_run(run), known_mlflow()
    try:
        page = mlflow.page(log_run(finished, mlflow))
    except Exception as error:
        if not transient(error):
            raise
        command.say(f"MLflow does not answer ({reason(error)})")
        return 1
    print(f"mta: {finished.name} is in MLflow: {page or masked(mlflow.uri)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    os.environ.update(TELEMETRY_OFF)
    arguments = sys.argv[1:] if arguments is None else arguments
    return command.run(app, arguments or ["--help"])


if __name__ == "__main__":
    raise SystemExit(main())
