"""The flow `mta/personalise`: new users of a finished run, on the worker that made it.

    prefect deployment run mta/personalise -p user=user.json -p to=personalised --watch

`mta personalise` does the same without Prefect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import State, flow, task
from prefect.states import Completed, Failed

from flows.mta import Seed
from tasks.errors import InputError
from tasks.log import log
from tasks.methods import MethodName
from tasks.personalise.new_users import personalise as make
from tasks.running.slots import cpu_jobs, device_of, gpu_slots
from tasks.tracking.taken_run import run_of


@flow(name="mta", persist_result=False)
def personalise(
    user: str,
    run: str = "last",
    to: str = "personalised",
    lamp_task: str | None = None,
    keep: Literal["folder", "recipe"] = "folder",
    method: MethodName = "mta",
    seed: Seed | None = None,
) -> State[Any]:
    """Give new users their LoRAs, by their histories and the bank of a finished run.

    Args:
        user: a user file of the worker's machine, JSON or JSON Lines, without queries.
        run: a run's name, id or file; `last` ended last; or a registered bank, as MLflow names it:
            `models:/mta-bank/3`, `models:/mta-bank@champion`.
        to: the folder that users' folders are written into.
        lamp_task: of the run; by default its first.
        keep: PEFT folders, or recipes as JSON alone.
        method: of the run, one that merges.
        seed: of the run; by default its first.
    """
    made, left_out = new_users(user, run, to, lamp_task, keep, method, seed)
    text = f"{made} users made in {to}"
    if left_out:
        why = "; ".join(left_out)
        return Failed(name="Incomplete", message=f"{text}, others not: {why}"[:1000])
    return Completed(message=text)


@task(persist_result=False)
def new_users(
    user: str,
    run: str,
    to: str,
    lamp_task: str | None,
    keep: Literal["folder", "recipe"],
    method: MethodName,
    seed: int | None,
) -> tuple[int, list[str]]:
    """How many users were made, and why others were not; a line of each is in the log."""
    made, left_out = 0, list[str]()
    try:
        taken = run_of(run)
        on_gpu = device_of(taken.cells[0].config.compute) == "cuda"
        gpu_slots(1 if on_gpu else cpu_jobs())  # the limit may not be there yet
        for told in make(taken, Path(user), Path(to), lamp_task, method, seed, keep):
            if isinstance(told, InputError):
                left_out.append(str(told))
                log(left_out[-1], warning=True)
            else:
                made += 1
                log(told)
    except InputError as error:
        left_out.append(str(error))
        log(left_out[-1], warning=True)
    return made, left_out
