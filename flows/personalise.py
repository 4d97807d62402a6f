"""The flow `mta/personalise`: new users of a finished run, on the worker that made it.

    prefect deployment run mta/personalise -p user=user.json -p to=personalised --watch

`mta personalise` does the same without Prefect.
"""

from pathlib import Path
from typing import Any

from prefect import State, flow, task

from flows.mta import Seed
from tasks.errors import InputError
from tasks.export import Finished
from tasks.log import log
from tasks.methods import MethodName
from tasks.personalise.new_users import Keep
from tasks.personalise.new_users import personalise as make
from tasks.running.jobs import ended
from tasks.running.slots import cpu_jobs, device_of, gpu_slots
from tasks.tracking.taken_run import run_of


@flow(name="mta", persist_result=False)
def personalise(
    user: str,
    run: str = "last",
    to: str = "personalised",
    lamp_task: str | None = None,
    keep: Keep = "folder",
    method: MethodName = "mta",
    seed: Seed | None = None,
) -> State[Any]:
    """Make new users' LoRAs from their histories and the bank of a finished run.

    Args:
        user: a user file on the worker's machine, JSON or JSON Lines, without queries.
        run: a run's name, id or file; `last`, the one that ended last; or a registered bank, as
            MLflow names it: `models:/mta-bank/3`, `models:/mta-bank@champion`.
        to: the folder that users' folders are written into.
        lamp_task: of the run; by default its first.
        keep: PEFT folders, or recipes as JSON alone.
        method: of the run, one that merges.
        seed: of the run; by default its first.
    """

    @task(persist_result=False)
    def new_users() -> list[str | InputError]:
        """A line for each user who got LoRAs, an error for each other; the log has all of them."""
        lines: list[str | InputError] = []
        try:
            finished = Finished(run_of(run), lamp_task, method, seed)
            on_gpu = device_of(finished.cell.config.compute) == "cuda"
            gpu_slots(1 if on_gpu else cpu_jobs())  # the limit may not be there yet
            for line in make(finished, Path(user), Path(to), keep):
                lines.append(line)
                log(str(line), warning=isinstance(line, InputError))
        except InputError as error:
            lines.append(error)
            log(str(error), warning=True)
        return lines

    lines = new_users()
    left_out = [str(line) for line in lines if isinstance(line, InputError)]
    return ended(f"{len(lines) - len(left_out)} users made in {to}", left_out)
