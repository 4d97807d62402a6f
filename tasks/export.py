"""Write one user's LoRA (merged and stacked, as one) as an ordinary PEFT folder.

    python -m tasks.export --user few_shot-00003 --to my-lora [--lamp-task LaMP-2M] [--run FILE]

takes the user from the last run (or the one named, a file in `.mta/runs`). The folder loads in
stock PEFT: `PeftModel.from_pretrained(base, "my-lora")`; `mta.json` in it says how prompts look.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tasks.artifacts import Store
from tasks.base_model import base_folder, model_name
from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.fusion import read_recipes
from tasks.questions import profile_questions
from tasks.report import RUNS_FOLDER
from tasks.stage import store


def export(
    where: Store, run: dict[str, Any], lamp_task: str, user_id: str, folder: Path
) -> tuple[Path, bool]:
    """Write the user's LoRA to `folder`, which must not exist yet.

    Returns the base model's folder, and whether there was a stacked LoRA (else: merged only).

    Raises InputError when the run has no such LaMP task or user.
    """
    from tasks.lora.adapters import write_peft
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import concatenate, merge

    if lamp_task not in run["lamp_tasks"]:
        known = ", ".join(run["lamp_tasks"])
        raise InputError(f"--lamp-task {lamp_task}: not in this run; it has {known}")
    if folder.exists():
        raise InputError(f"--to {folder}: is there already; name a new folder")
    config = RunConfig.model_validate(run["config"])
    stages = run["lamp_tasks"][lamp_task]
    recipes = read_recipes(where, stages["fusion"])
    if user_id not in recipes:
        few = ", ".join(sorted(recipes)[:5])
        raise InputError(f"--user {user_id}: no few-shot user of this run; there are {few}, ...")
    bank = read_bank(where.open(stages["bank"]["ref"]).folder / "bank.safetensors")
    recipe = recipes[user_id]
    members = [bank.lora(anchor) for anchor in recipe["anchors"]]
    lora = merge(members, recipe["weights"], config.fusion.merge)
    stacked_too = False
    for shard in stages["stacking"]:
        if user_id in shard["value"]["users"]:
            stacked = read_bank(where.open(shard["ref"]).folder / "stacked.safetensors")
            lora = concatenate(lora, stacked.lora(user_id))
            stacked_too = True
    base = base_folder(config, where, stages["base"])
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    write_peft(scratch, lora, model_name(config))
    # A LoRA is good for the prompts it was trained on: this says how they look.
    instruction = stages["prepared"]["value"]["instruction"]
    blank = {"id": "", "text": "<text>", "answer": "<answer>"}
    (sample,) = profile_questions(config, lamp_task, instruction, [blank])
    about = {"lamp_task": lamp_task, "user": user_id, "base": base.name, "prompt": sample.prompt}
    (scratch / "mta.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    scratch.rename(folder)
    return base, stacked_too


def last_run(where: Store) -> Path:
    """The file of the run that ended last. Raises InputError when there is none."""
    files = sorted(
        (where.root.parent / RUNS_FOLDER).glob("*.json"), key=lambda file: file.stat().st_mtime
    )
    if not files:
        raise InputError(f"{where.root.parent / RUNS_FOLDER}: no run yet; run the flow first")
    return files[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.export", description=__doc__)
    parser.add_argument("--user", required=True, help="a few-shot user's id")
    parser.add_argument("--to", required=True, type=Path, help="the folder to write, a new one")
    parser.add_argument("--lamp-task", default=None, help="default: the run's first")
    parser.add_argument("--run", type=Path, default=None, help="a file of .mta/runs")
    given = parser.parse_args(arguments)
    where = store()
    try:
        file = given.run or last_run(where)
        try:
            run = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--run {file}: cannot be read ({error})") from error
        lamp_task = given.lamp_task or next(iter(run["lamp_tasks"]))
        base, stacked_too = export(where, run, lamp_task, given.user, given.to)
    except InputError as error:
        print(f"mta: {error}", file=sys.stderr)
        return 2
    what = "merged and stacked LoRA" if stacked_too else "merged LoRA (the run stacked none on it)"
    print(f"{given.to}: {what} of {given.user} for {lamp_task}; its base model is {base}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
