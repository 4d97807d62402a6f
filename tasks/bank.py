"""Stage 5: the bank. Each anchor's LoRA is trained, then all are put side by side.

One job trains `anchors.per_job` of them. Or `bank.adapters` names PEFT folders of LoRAs that
somebody else trained. Their users are unknown, so recipes go by evidence alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tasks.config.options import BankOptions, TrainingOptions
from tasks.errors import InputError, label
from tasks.files import sha256_of
from tasks.log import log
from tasks.model import Made, bare_model, checkpoint, loaded_model
from tasks.record import OUTSIDE_KEY, File, Record, derive_seed, digest, key_of
from tasks.results.models import Anchor, Anchors, Bank, Base, MetaLora, MetaLoras, Setting, Training
from tasks.results.rows import known_rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES, check_content, folder_hash, hub_snapshot, model_name
from tasks.text.questions import Item, content
from tasks.users import users_of
from tasks.users_map import draw_map

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.checkpoint import Checkpoint
    from tasks.lora.targets import AnyModel

META, BANK = "meta_lora.json", "bank.safetensors"
# What is read of a given PEFT folder. Pickles are not even fetched.
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@stage(version=7, libraries=LIBRARIES, uses_model=True)
def meta_lora(
    options: TrainingOptions, anchors: tuple[Anchor, ...], candidates: File, setting: Setting
) -> MetaLoras:
    """Train the LoRAs of one job's anchors on the frozen base, at once, each as if alone.

    An anchor's LoRA depends on its own history, not on the other anchors. So one that an earlier
    job trained is reused.
    """
    members = [name for anchor in anchors for name in anchor.members]
    profiles = {user["user_id"]: user["profile"] for user in users_of(candidates, members)}
    shared = key_of(meta_lora.identity, options, setting)
    keys = {
        key_of(
            shared,
            anchor.name,
            anchor.members,
            [content(profiles[name]) for name in anchor.members],
        ): anchor
        for anchor in anchors
    }
    known = known_rows("meta_lora", keys, _read)
    failed: list[str] = []
    if missing := {key: anchor for key, anchor in keys.items() if key not in known}:
        users = [name for anchor in missing.values() for name in (anchor.name, *anchor.members)]
        with checkpoint(setting.compute, "meta_lora", digest([*missing]), users) as kept:
            made = _train(options, [*missing.values()], profiles, setting, kept)
            for (key, anchor), (lora, training) in zip(missing.items(), made, strict=True):
                if training.failed:
                    failed.append(
                        f"anchor {label(anchor.name)}: the loss was not finite at step "
                        f"{training.steps}; lower meta_lora.learning_rate"
                    )
                else:
                    known[key] = stored(
                        "meta_lora", anchor.name, anchor.members, (lora, training), setting.base,
                        [key],
                    )  # fmt: skip
    loras = tuple(known[key] for key in keys if key in known)
    return MetaLoras(loras=loras, failed=tuple(failed))


def _train(
    options: TrainingOptions,
    chosen: Sequence[Anchor],
    profiles: Mapping[str, Sequence[Item]],
    setting: Setting,
    kept: Checkpoint | None,
) -> list[Made]:
    """Each anchor's LoRA, and how its training went."""
    from tasks.lora.tokens import joined

    histories = [[profiles[name] for name in anchor.members] for anchor in chosen]
    if setting.questions.prompt.history_items:
        # A prompt then shows items of the whole cluster. Else users stay apart: tokens of each may
        # be in the store.
        histories = [[[*chain(*history)]] for history in histories]
    with loaded_model(setting) as model:
        flat = [{"profile": profile} for profile in chain(*histories)]
        tokens = iter(model.tokens("profile", flat))
        samples = [joined(islice(tokens, len(history))) for history in histories]
        seeds = [derive_seed(setting.seed, "meta_lora", anchor.name) for anchor in chosen]
        return model.train(options, samples, seeds, checkpoint=kept)


def stored(
    stage: str,
    name: str,
    members: Sequence[str],
    made: Made,
    base: Base,
    rows: Sequence[str] | None = None,
) -> MetaLora:
    """Store one bank member in its own folder: the adapter and its users. rows: its row's key."""
    from tasks.lora.adapters import write_peft

    lora, training = made
    # Leave the seconds out: a LoRA made again then has the same content and the same folder.
    how = training.model_dump(exclude={"seconds"})
    about = {"anchor": name, "members": [*members], "training": how}
    with store().new(stage, rows) as folder:
        write_peft(folder.path / "adapter", lora, model_name(base.model))
        (folder.path / META).write_text(json.dumps(about, ensure_ascii=False))
    return MetaLora.model_validate(
        about | {"adapter": folder.file("adapter"), "training": training}
    )


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

    adapters = [read_peft(store().path(one.adapter)) for one in loras]
    with store().new("bank") as folder:
        write_bank(folder.path / BANK, stack([one.anchor for one in loras], adapters))
        draw_map(folder.path / "map.png", title, chosen, loras)
    return Bank(file=folder.file(BANK), members=loras, map=folder.file("map.png"))


class GivenAdapter(Record):
    """A PEFT folder: what recipes call it, where it lies, and the hash of its files."""

    name: str
    path: Annotated[str, OUTSIDE_KEY]
    content: str


def given_adapters(options: BankOptions) -> tuple[GivenAdapter, ...]:
    """The adapters of `bank.adapters`, named after their folders, or by their hub ids.

    Raises InputError where a place holds none, or two have one name.
    """
    places = options.adapters or []
    adapters: dict[str, Path] = {}
    for place in [places] if isinstance(places, str) else places:
        for name, folder in _folders(place).items():
            if name in adapters:
                raise InputError(
                    f"bank.adapters: {adapters[name]} and {folder} have one name; rename one"
                )
            adapters[name] = folder
    log(f"bank: {len(adapters)} adapters are given: {', '.join(map(label, adapters))}")
    return tuple(
        GivenAdapter(name=name, path=str(folder), content=folder_hash(folder, FILES))
        for name, folder in adapters.items()
    )


def _folders(place: str) -> dict[str, Path]:
    """Name -> PEFT folder: the folder itself, those in it, or the hub's of that id."""
    folder = Path(place).expanduser().absolute()
    if not folder.is_dir():
        return {place: hub_snapshot("bank.adapters", place, FILES)}
    if (folder / FILES[0]).exists():
        return {folder.name: folder}
    inside = {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{FILES[0]}"))}
    if not inside:
        raise InputError(
            f"bank.adapters {place}: neither it nor a folder in it has {FILES[0]}; give PEFT "
            "folders, or a folder of them"
        )
    return inside


@stage(version=1, libraries=LIBRARIES)
def own_bank(adapters: tuple[GivenAdapter, ...], base: Base) -> Bank:
    """The adapters side by side, each as wide as the widest (`merge.alike`).

    Raises InputError, naming the folder, if one is no plain LoRA of the base model.
    """
    from tasks.lora.bank import stack, write_bank
    from tasks.lora.merge import alike

    loras = read_adapters(adapters, bare_model(base))
    # Store each at its own rank: its row stays valid when a wider adapter is added.
    members = [
        stored("own_bank", name, (), (lora, Training()), base) for name, lora in loras.items()
    ]
    with store().new("own_bank") as folder:
        write_bank(folder.path / BANK, stack([*loras], alike([*loras.values()])))
    return Bank(file=folder.file(BANK), members=tuple(members))


def read_adapters(adapters: Sequence[GivenAdapter], model: AnyModel) -> dict[str, Lora]:
    """Name -> LoRA. model: the base model's layers, on the meta device.

    Raises InputError, naming the folder, if one is no plain LoRA of the model.
    """
    from tasks.lora.adapters import read_peft
    from tasks.lora.targets import misfit

    loras = {}
    for one in adapters:
        folder = Path(one.path)
        loras[one.name] = read_peft(folder)
        check_content(f"bank.adapters {one.name}", folder, FILES, one.content)
        if why := misfit(model, loras[one.name].layers):
            raise InputError(f"{folder}: does not go with base.model: {why}; leave it out")
    return loras
