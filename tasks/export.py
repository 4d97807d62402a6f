r"""Write one user's LoRA (merged and stacked, as one) as an ordinary PEFT folder.

    python -m tasks.export --user few_shot-00003 --to my-lora \
        [--lamp-task LaMP-2M] [--method mta] [--seed 0] [--run NAME]

takes the user from the last run, or the one named, and says which it was. The folder loads in
stock PEFT: `PeftModel.from_pretrained(base, "my-lora")`; `mta.json` in it says how prompts look.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

from tasks.base_model import base_folder, model_name
from tasks.command import in_one_line
from tasks.config import RunConfig
from tasks.errors import InputError, label
from tasks.fusion import read_recipes
from tasks.methods import METHODS, MethodName
from tasks.questions import user_queries
from tasks.report.files import read_run, shown_run
from tasks.stage import store
from tasks.store.artifacts import Store


def export(
    where: Store,
    run: dict[str, Any],
    lamp_task: str,
    method: MethodName,
    user_id: str,
    folder: Path,
    seed: int | None = None,
) -> Path:
    """Write the LoRA that `method` gives the user to `folder`, which must not exist yet.

    `seed` is one of the run's, None for its first. Returns the base model's folder. Raises
    InputError when the run has no such seed, LaMP task, method or user.
    """
    from tasks.lora.adapters import read_peft, write_peft
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import concatenate, merge

    chosen = next(iter(run["seeds"])) if seed is None else str(seed)
    _listed("--seed", chosen, run["seeds"])
    _listed("--lamp-task", lamp_task, run["seeds"][chosen])
    stages = run["seeds"][chosen][lamp_task]
    adapted = [name for name in METHODS if name in {*stages["bank_of"], *stages["stacking"]}]
    _listed("--method", method, adapted)
    if folder.exists():
        raise InputError(f"--to {folder}: is there already; name a new folder")
    asked = RunConfig.model_validate(run["config"])
    config = asked.for_task(lamp_task, int(chosen)).for_method(method)
    few_shot = stages["prepared"]["value"]["few_shot"]
    if user_id not in few_shot:
        few = ", ".join(map(label, sorted(few_shot)[:5]))
        raise InputError(
            f"--user {user_id}: no few-shot user of {shown_run(run)}; there are {few}, ..."
        )
    loras = []
    if adapter := stages["base"].get("adapter"):
        # The base model that the folder goes with is the one without it.
        loras.append(read_peft(where.open(adapter["ref"]).folder / "adapter"))
    if method in stages["bank_of"]:
        own = stages["banks"][stages["bank_of"][method]]
        bank = read_bank(where.open(own["bank"]["ref"]).folder / "bank.safetensors")
        recipe = read_recipes(where, own["fusion"])[user_id]
        members = [bank.lora(anchor) for anchor in recipe["anchors"]]
        loras.append(merge(members, recipe["weights"], config.fusion.merge))
    if METHODS[method].trained:
        held = [s for s in stages["stacking"][method] if user_id in s["value"]["users"]]
        # A batch of users that failed: the merged LoRA alone is not what the method gives.
        if not held:
            raise InputError(
                f"--user {user_id}: the run trained no LoRA of this user; run it again"
            )
        stacked = read_bank(where.open(held[0]["ref"]).folder / "stacked.safetensors")
        loras.append(stacked.lora(user_id))
    lora = reduce(concatenate, loras)
    base = base_folder(config, where, stages["base"])
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    write_peft(scratch, lora, model_name(config))
    # A LoRA is good for the prompts it was trained on: this says how they look.
    instruction = stages["prepared"]["value"]["instruction"]
    question = {"id": "", "input": f"{instruction}<text>", "gold": ""}
    (sample,) = user_queries(config, lamp_task, instruction, {"profile": [], "query": [question]})
    about = {
        "lamp_task": lamp_task,
        "method": method,
        "user": user_id,
        "base": base.name,
        "prompt": sample.prompt,
        "chat": config.prompt.chat,
    }
    (scratch / "mta.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    scratch.rename(folder)
    return base


def _listed(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(f"{option} {value}: not in this run; it has {', '.join(known)}")


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.export", description=__doc__)
    parser.add_argument("--user", required=True, help="a few-shot user's id")
    parser.add_argument("--to", required=True, type=Path, help="the folder to write, a new one")
    parser.add_argument("--lamp-task", default=None, help="default: the run's first")
    parser.add_argument("--method", default="mta", help="default: mta")
    parser.add_argument("--seed", type=int, default=None, help="default: the run's first")
    parser.add_argument("--run", default="last", help="a run's name, id or file; default: the last")
    given = parser.parse_args(arguments)
    where = store()
    run = read_run(where, given.run)
    lamp_task = given.lamp_task or next(iter(next(iter(run["seeds"].values()))))
    base = export(where, run, lamp_task, given.method, given.user, given.to, given.seed)
    print(
        f"{given.to}: the LoRA of {label(given.user)} by {given.method} for {lamp_task}, from "
        f"{shown_run(run)}; its base model is {base}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
