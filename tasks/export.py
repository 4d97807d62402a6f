"""One user's LoRA (merged and stacked, as one) as an ordinary PEFT folder: `mta export`.

It loads in stock PEFT: `PeftModel.from_pretrained(base, "my-lora")`. `mta.json` in it says how
prompts look.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import InputError, label
from tasks.fusion import Merger
from tasks.methods import METHODS, MethodName
from tasks.report.files import shown_run
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.text.loading import model_folder, model_name
from tasks.text.questions import questions_of, user_queries

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora


def export(
    run: Run,
    lamp_task: str,
    method: MethodName,
    user_id: str,
    folder: Path,
    seed: int | None = None,
) -> Path:
    """Write the LoRA that `method` gives the user to `folder`, which must not exist yet.

    seed: one of the run's, None for its first. Returns the base model's folder. Raises InputError
    when the run has no such seed, LaMP task, method or user.
    """
    from tasks.lora.adapters import write_peft
    from tasks.lora.merge import concatenate

    seeds = list(dict.fromkeys(one.config.seed for one in run.cells))
    seed = seeds[0] if seed is None else seed
    _listed("--seed", str(seed), map(str, seeds))
    cells = {one.config.lamp_task: one for one in run.cells if one.config.seed == seed}
    _listed("--lamp-task", lamp_task, cells)
    cell = cells[lamp_task]
    adapted = [name for name in METHODS
               if any(one.merged or one.stacked for one in cell.answers.get(name, ()))]  # fmt: skip
    _listed("--method", method, adapted)
    if folder.exists():
        raise InputError(f"--to {folder}: is there already; name a new folder")
    if user_id not in cell.users.few_shot_ids:
        few = ", ".join(map(label, sorted(cell.users.few_shot_ids)[:5]))
        raise InputError(
            f"--user {user_id}: no few-shot user of {shown_run(run)}; there are {few}, ..."
        )
    lora = reduce(concatenate, _loras(cell, method, user_id))
    base, own = model_folder(cell.base), cell.config.method(method)
    questions = questions_of(own.prompt, cell.users, own.base.model)
    query = {"id": "", "input": f"{cell.users.instruction}<text>", "gold": ""}
    (sample,) = user_queries(questions, {"profile": [], "query": [query]})
    about = {
        "lamp_task": lamp_task,
        "method": method,
        "user": user_id,
        "base": base.name,
        "prompt": sample.prompt,
        "chat": own.prompt.chat,
    }
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    write_peft(scratch, lora, model_name(cell.base.model))
    (scratch / "mta.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    scratch.rename(folder)
    return base


def _loras(cell: Cell, method: MethodName, user_id: str) -> list[Lora]:
    """What is added to the base model for the user: their updates sum up.

    Raises InputError where the user's batch failed: a part of it is not what the method gives.
    """
    import torch

    from tasks.lora.adapters import read_peft
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import MergedUsers

    batch = next((one for one in cell.answers[method] if user_id in one.users), None)
    if batch is None:
        raise InputError(f"--user {user_id}: the run trained no LoRA of this user; run it again")
    loras = []
    if cell.base.adapter:
        # The base model that the folder goes with is the one without it.
        loras.append(read_peft(store().path(cell.base.adapter)))
    merging = cell.merging(method)
    if batch.merged and merging:
        chosen = Merger(merging.merged).chosen([user_id])
        merged = MergedUsers(*chosen, torch.device("cpu"))
        loras.append(merged.parts([0]).one(0))
    if batch.stacked:
        loras.append(read_bank(store().path(batch.stacked)).lora(user_id))
    return loras


def _listed(option: str, value: str, known: Iterable[str]) -> None:
    names = list(known)
    if value not in names:
        raise InputError(f"{option} {value}: not in this run; it has {', '.join(names)}")
