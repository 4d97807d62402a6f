"""Stage 5: the bank. One task run per anchor (or per `anchors.per_job` of them) trains its
meta-LoRA; then the LoRAs are stacked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base_model import load, model_name, model_parts, prompt_parts
from tasks.config import RunConfig, derive_seed
from tasks.errors import InputError, label
from tasks.options import TrainingOptions
from tasks.prepare import users_of
from tasks.questions import Item, content
from tasks.stage import gpu_slot, stage, store
from tasks.store.artifacts import Store
from tasks.store.checkpoints import checkpoint_of
from tasks.store.pieces import NOTES, Piece, digest
from tasks.tokens import tokens_of

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.checkpoint import Checkpoint
    from tasks.lora.group_train import Outcome
    from tasks.lora.merge import MergedUsers
    from tasks.lora.train import Recipe

VERSION = 5
# In the notes of an anchor's piece: the keys of those it was trained with, in order, and its own.
COMPANY = "company"


def _job_name(parameters: dict[str, Any]) -> str:
    anchors = parameters["anchors"]
    more = f"-and-{len(anchors) - 1}-more" if len(anchors) > 1 else ""
    return f"meta-lora-{label(anchors[0]['user_id'])}{more}"


@stage(name="meta-lora", uses_model=True, task_run_name=_job_name)
def meta_lora(
    config: dict[str, Any],
    lamp_task: str,
    prepared: dict[str, Any],
    base: dict[str, Any],
    anchors: list[dict[str, Any]],
) -> list[Piece | InputError]:
    """Train the LoRAs of one job's anchors on the frozen base; each a PEFT folder `adapter`.

    `anchors`: entries of the `anchors` stage. All that are not known yet are trained at once, each
    as if alone. An anchor depends on its own history, not on which other anchors there are; only
    the rounding of its last bits does. So one that was made before and lost is made again in the
    company it had, which the others' notes name.
    """
    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    members = [name for anchor in anchors for name in anchor["members"]]
    users = {user["user_id"]: user for user in users_of(where, prepared, "anchor", members)}
    profiles = {
        anchor["user_id"]: [item for name in anchor["members"] for item in users[name]["profile"]]
        for anchor in anchors
    }
    keys = {
        anchor: digest(
            {
                "version": VERSION,
                "lamp_task": lamp_task,
                "anchor": anchor,
                "history": content(profile),
                "training": options.meta_lora.model_dump(),
                "seed": options.seed,
                **prompt_parts(options, instruction),
                **model_parts(options, base),
            }
        )
        for anchor, profile in profiles.items()
    }
    pieces: dict[str, Piece | InputError] = {}
    _find(where, keys, pieces)
    # Another run may be training some of them: they are waited for, and then found.
    with where.claimed("meta_lora", [keys[anchor] for anchor in keys if anchor not in pieces]):
        _find(where, keys, pieces)
        todo = [anchor for anchor in keys if anchor not in pieces]
        together = _together(keys, pieces, todo)
        # Without history in the prompts a cluster's questions are its users' own, known or not.
        apart = not options.prompt.history_items
        histories: dict[str, list[Sequence[Item]]] = {
            anchor["user_id"]: [users[name]["profile"] for name in anchor["members"]]
            if apart
            else [profiles[anchor["user_id"]]]
            for anchor in anchors
            if anchor["user_id"] in together
        }
        made, checkpoint = {}, None
        wanted = [keys[anchor] for anchor in histories]
        if todo:
            company = [n for anchor in anchors for n in (anchor["user_id"], *anchor["members"])]
            checkpoint = checkpoint_of(
                options, where, "meta_lora", digest(wanted), company, pieces=wanted
            )
            made = _train(options, lamp_task, instruction, where, base, histories, checkpoint)
        for anchor in todo:
            result = made[anchor]
            if isinstance(result, InputError):
                pieces[anchor] = result
                continue
            lora, value = result
            value[NOTES][COMPANY] = wanted
            write = partial(_write, lora, value, model_name(options))
            pieces[anchor] = where.make("meta_lora", keys[anchor], write)
        if checkpoint:
            checkpoint.remove()
    return [pieces[anchor["user_id"]] for anchor in anchors]


def _together(
    keys: dict[str, str], pieces: dict[str, Piece | InputError], todo: list[str]
) -> set[str]:
    """The anchors to train: `todo`, and those that some of them were trained with before."""
    companies = [p.notes.get(COMPANY, []) for p in pieces.values() if isinstance(p, Piece)]
    lost = {keys[anchor] for anchor in todo}
    before = {key for company in companies if lost.intersection(company) for key in company}
    # Of another job, or with another history by now: it cannot be as it was.
    if not before <= set(keys.values()):
        before = set()
    return {anchor for anchor, key in keys.items() if key in lost | before}


def _find(where: Store, keys: dict[str, str], pieces: dict[str, Piece | InputError]) -> None:
    """Add to `pieces` those anchors that are in the store by now."""
    for anchor, key in keys.items():
        if anchor not in pieces and (found := where.find("meta_lora", key)):
            pieces[anchor] = found


def _write(lora: Lora, value: dict[str, Any], model: str, out: Path) -> dict[str, Any]:
    from tasks.lora.adapters import write_peft

    write_peft(out / "adapter", lora, model)
    return value


def _train(
    options: RunConfig,
    lamp_task: str,
    instruction: str,
    where: Store,
    base: dict[str, Any],
    histories: dict[str, list[Sequence[Item]]],
    checkpoint: Checkpoint | None,
) -> dict[str, tuple[Lora, dict[str, Any]] | InputError]:
    """Per anchor its LoRA and what is recorded of it, or why there is none.

    histories: per anchor the profiles whose questions it is trained on.
    """
    from tasks.lora.tokens import joined

    with gpu_slot():
        started = time.perf_counter()
        loaded = load(options, where, base)
        flat = [{"profile": profile} for own in histories.values() for profile in own]
        found = iter(
            tokens_of(options, where, lamp_task, instruction, base, loaded, "profile", flat)
        )
        samples = {a: joined(islice(found, len(own))) for a, own in histories.items()}
        seeds = [derive_seed(options.seed, "meta_lora", anchor) for anchor in samples]
        loras, outcome = train_users(
            loaded, options.meta_lora, list(samples.values()), seeds, checkpoint=checkpoint
        )
        # Of the work itself: waiting for the slot is not a cost of the method.
        seconds = round((time.perf_counter() - started) / len(samples), 3)
    made: dict[str, tuple[Lora, dict[str, Any]] | InputError] = {}
    for number, anchor in enumerate(samples):
        losses = outcome.losses[number]
        if number in outcome.failed:
            made[anchor] = InputError(
                f"anchor {label(anchor)}: the loss was not finite at step {len(losses)}; "
                "lower meta_lora.learning_rate"
            )
            continue
        value = {
            "anchor": anchor,
            "items": len(samples[anchor]),
            "steps": len(losses),
            "losses": losses,
            "tokens": outcome.tokens[number],
            "truncated": samples[anchor].truncated,
            NOTES: {"seconds": seconds},
        }
        made[anchor] = (loras[number], value)
    return made


@stage(name="bank")
def bank(trained: list[dict[str, Any]], users: dict[str, list[str]]) -> Piece:
    """`bank.safetensors` of the anchors that were trained (results of `meta_lora`), in order.

    `users`: per anchor the candidates whose items it is trained on. What is made of a bank that
    lacks some of these anchors is kept apart from what is made of a whole one: users whose recipe
    needs none of them would else be trained in another company than without the failure, and
    differ in their last bits.
    """
    where = store()
    ids = [item["value"]["anchor"] for item in trained]
    members = [[item["ref"]["sha256"], users[item["value"]["anchor"]]] for item in trained]
    lacking = [anchor for anchor in users if anchor not in ids]
    apart = {"lacking": lacking} if lacking else {}
    key = digest({"version": VERSION, "members": members, **apart})

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.adapters import read_peft
        from tasks.lora.bank import stack, write_bank

        loras = [read_peft(where.open(item["ref"]).folder / "adapter") for item in trained]
        write_bank(out / "bank.safetensors", stack(ids, loras))
        return {
            "ids": ids,
            # What a member is made of: recipes and their users are keyed by it.
            "members": {
                anchor: item["ref"]["sha256"] for anchor, item in zip(ids, trained, strict=True)
            },
            "users": {anchor: users[anchor] for anchor in ids},
            "rank": loras[0].rank,
            "scale": loras[0].scale,
            **apart,
        }

    return where.get("bank", key, make)


def train_users(
    base: Base,
    options: TrainingOptions,
    samples: Sequence[Sequence[Encoded]],
    seeds: Sequence[int],
    frozen: MergedUsers | None = None,
    initial: Sequence[Lora] | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[list[Lora], Outcome]:
    """One LoRA per user, trained at once on the users' samples, over their merged LoRAs if any.

    `initial`: one LoRA per user to go on from, instead of fresh ones by `seeds`.
    `checkpoint`: where the state is kept.
    """
    from tasks.lora.adapters import Lora
    from tasks.lora.group_train import train_group
    from tasks.lora.grouped import grouped, shapes_of

    recipe = recipe_of(options)
    shapes = shapes_of(base.model, options.target_modules, options.rank)
    scale = options.alpha / options.rank
    names = sorted({*shapes.sizes, *(frozen.layers if frozen else ())})
    with grouped(base.model, names) as layers:
        outcome = train_group(
            base,
            layers,
            shapes,
            samples,
            recipe,
            seeds,
            scale=scale,
            frozen=frozen.parts if frozen else None,
            initial=shapes.join([lora.layers for lora in initial]) if initial else None,
            progress=progress,
            checkpoint=checkpoint,
        )
    split = shapes.split(outcome.flat.cpu())
    loras = [
        Lora({name: (a[u].clone(), b[u].clone()) for name, (a, b) in split.items()}, scale)
        for u in range(len(samples))
    ]
    return loras, outcome


def recipe_of(options: TrainingOptions) -> Recipe:
    """The options as the engine takes them."""
    from tasks.lora.train import Recipe

    return Recipe(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        schedule=options.schedule,
        warmup_share=options.warmup_share,
        max_grad_norm=options.max_grad_norm,
        weight_decay=options.weight_decay,
    )
