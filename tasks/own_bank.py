"""Stage 5, where the bank is given: LoRAs that somebody else trained, as stock PEFT folders.

`bank.adapters` names them. No users are known behind them, so recipes go by evidence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tasks.config.options import BankOptions
from tasks.errors import InputError, label
from tasks.log import log
from tasks.record import OUTSIDE_KEY, File, Record
from tasks.results.models import Bank, Base, MetaLora, Training
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import (
    LIBRARIES,
    check_content,
    folder_hash,
    hub_snapshot,
    model_folder,
    model_name,
)

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.targets import AnyModel

# Of a PEFT folder; pickles are not even fetched.
FILES = ["adapter_config.json", "adapter_model.safetensors"]


class GivenAdapter(Record):
    """A PEFT folder: what recipes call it, where it lies, and the hash of its files."""

    name: str
    path: Annotated[str, OUTSIDE_KEY]
    content: str


def given_adapters(options: BankOptions) -> tuple[GivenAdapter, ...]:
    """The adapters of `bank.adapters`, named after their folders, or by their hub ids.

    Raises InputError where a place holds none, or two have one name.
    """
    given = options.adapters or []
    found: dict[str, Path] = {}
    for place in [given] if isinstance(given, str) else given:
        for name, folder in _folders(place).items():
            if name in found:
                raise InputError(
                    f"bank.adapters: {found[name]} and {folder} have one name; rename one of them"
                )
            found[name] = folder
    log(f"bank: {len(found)} adapters are given: {', '.join(map(label, found))}")
    return tuple(
        GivenAdapter(name=name, path=str(folder), content=folder_hash(folder, FILES))
        for name, folder in found.items()
    )


def _folders(place: str) -> dict[str, Path]:
    """Name -> PEFT folder: the folder itself, those in it, or what the hub has of an id."""
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

    Raises InputError, which names the folder, for what is no plain LoRA of the base model.
    """
    from transformers import AutoConfig

    from tasks.lora.adapters import write_peft
    from tasks.lora.bank import stack, write_bank
    from tasks.lora.base import without_weights
    from tasks.lora.merge import alike

    shape = AutoConfig.from_pretrained(model_folder(base), trust_remote_code=False)
    loras = read_adapters(adapters, without_weights(shape))
    members = []
    for name, lora in loras.items():
        # Each as it is: what is known of one stays known when a wider one comes beside it.
        with store().new("own_bank") as folder:
            write_peft(folder.path / "adapter", lora, model_name(base.model))
        members.append(as_member(name, folder.file("adapter")))
    with store().new("own_bank") as folder:
        write_bank(folder.path / "bank.safetensors", stack([*loras], alike([*loras.values()])))
    return Bank(file=folder.file("bank.safetensors"), members=tuple(members))


def as_member(name: str, adapter: File) -> MetaLora:
    """An adapter in the bank: of no users, and not trained here."""
    return MetaLora(anchor=name, members=(), adapter=adapter, training=Training())


def read_adapters(adapters: Sequence[GivenAdapter], model: AnyModel) -> dict[str, Lora]:
    """Name -> LoRA. model: of the shape of the base model, on the meta device.

    Raises InputError, which names the folder, for what is no plain LoRA of the model.
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
