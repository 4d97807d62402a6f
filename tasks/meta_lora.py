"""Stage 5: the bank. One job per anchor (or per `anchors.per_job` of them) trains its meta-LoRA;
then the LoRAs are put side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config.options import TrainingOptions
from tasks.config.task import derive_seed
from tasks.errors import label
from tasks.files import sha256_of
from tasks.prepare import users_of
from tasks.record import File, digest, key_of
from tasks.results.models import Anchor, Anchors, Bank, MetaLora, MetaLoras, Setting, Training
from tasks.results.rows import known_rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load, model_name
from tasks.text.questions import Item, content
from tasks.text.tokens import tokens_of
from tasks.training import checkpoint, train_loras, trainings
from tasks.users_map import draw_map

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.checkpoint import Checkpoint

META = "meta_lora.json"


@stage(version=7, libraries=LIBRARIES, uses_model=True)
def meta_lora(
    options: TrainingOptions, anchors: tuple[Anchor, ...], candidates: File, setting: Setting
) -> MetaLoras:
    """Train the LoRAs of one job's anchors on the frozen base, at once, each as if alone.

    An anchor depends on its own history, not on which other anchors there are, so one that was
    trained before is found.
    """
    members = [name for anchor in anchors for name in anchor.members]
    profiles = {user["user_id"]: user["profile"] for user in users_of(candidates, members)}
    shared = key_of(meta_lora.identity, options, setting)
    keys = [
        key_of(shared, anchor.name, [content(profiles[name]) for name in anchor.members])
        for anchor in anchors
    ]
    known = known_rows("meta_lora", keys, _read)
    missing = [number for number, key in enumerate(keys) if key not in known]
    failed: list[str] = []
    if missing:
        chosen = [anchors[number] for number in missing]
        users = [name for anchor in chosen for name in (anchor.name, *anchor.members)]
        job = digest([keys[number] for number in missing])
        with checkpoint(setting.compute, "meta_lora", job, users) as kept:
            made = _train(options, chosen, profiles, setting, kept)
            for number, lora, training in zip(missing, *made, strict=True):
                if training.failed:
                    failed.append(
                        f"anchor {label(anchors[number].name)}: the loss was not finite at step "
                        f"{training.steps}; lower meta_lora.learning_rate"
                    )
                else:
                    key, anchor = keys[number], anchors[number]
                    known[key] = _keep(key, anchor, lora, training, setting.base.model)
    loras = tuple(known[key] for key in keys if key in known)
    return MetaLoras(loras=loras, failed=tuple(failed))


def _train(
    options: TrainingOptions,
    chosen: Sequence[Anchor],
    profiles: Mapping[str, Sequence[Item]],
    setting: Setting,
    kept: Checkpoint | None,
) -> tuple[list[Lora], list[Training]]:
    """Each anchor's LoRA, and how its training went."""
    from tasks.lora.tokens import joined

    questions, base = setting.questions, setting.base
    # Without history in the prompts a cluster's questions are its users' own, known or not.
    apart = not questions.prompt.history_items
    histories: list[list[Sequence[Item]]] = [
        [profiles[name] for name in anchor.members]
        if apart
        else [[item for name in anchor.members for item in profiles[name]]]
        for anchor in chosen
    ]
    with gpu_slot():
        started = time.perf_counter()
        loaded = load(base, setting.compute)
        flat = [{"profile": profile} for own in histories for profile in own]
        tokens = iter(tokens_of(questions, base, loaded, "profile", flat))
        samples = [joined(islice(tokens, len(own))) for own in histories]
        seeds = [derive_seed(setting.seed, "meta_lora", anchor.name) for anchor in chosen]
        loras, outcome = train_loras(
            loaded, options, samples, seeds, checkpoint=kept, engine=base.engine
        )
        each = round((time.perf_counter() - started) / len(samples), 3)
    return loras, trainings(outcome, samples, each)


def _keep(key: str, anchor: Anchor, lora: Lora, training: Training, model: str) -> MetaLora:
    """Store one in a folder of its own, as the bank points to it."""
    # Without the seconds: made again, it has the same content, and so the same place.
    kept = training.model_dump(exclude={"seconds"})
    about = {"anchor": anchor.name, "members": anchor.members, "training": kept}
    with store().new("meta_lora", [key]) as folder:
        write_member(folder.path, about, lora, model)
    (found,) = _read(folder.file())
    return found.model_copy(update={"training": training})


def write_member(place: Path, about: Mapping[str, object], lora: Lora, model: str) -> None:
    """A bank member's adapter, and whose it is, in a folder of its own."""
    from tasks.lora.adapters import write_peft

    write_peft(place / "adapter", lora, model_name(model))
    (place / META).write_text(json.dumps(about, ensure_ascii=False))


def _read(folder: File) -> list[MetaLora]:
    path = store().path(folder)
    adapter = File(uri=f"{folder.uri}/adapter", sha256=sha256_of(path / "adapter"))
    about = json.loads((path / META).read_text(encoding="utf-8"))
    return [MetaLora.model_validate(about | {"adapter": adapter})]


@stage(version=7, libraries=("torch", "safetensors"))
def bank(loras: tuple[MetaLora, ...], chosen: Anchors, title: str) -> Bank:
    """The meta-LoRAs side by side, in the order of choice, and the users' map."""
    from tasks.lora.adapters import read_peft
    from tasks.lora.bank import stack, write_bank

    stacked = stack([one.anchor for one in loras],
                    [read_peft(store().path(one.adapter)) for one in loras])  # fmt: skip
    with store().new("bank") as folder:
        write_bank(folder.path / "bank.safetensors", stacked)
        draw_map(folder.path / "map.png", title, chosen, loras)
    return Bank(
        file=folder.file("bank.safetensors"),
        members=loras,
        map=folder.file("map.png"),
    )
