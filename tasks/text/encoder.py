"""Users' texts as vectors, by a sentence encoder (the extra `text`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tasks.config.options import ComputeOptions
from tasks.errors import InputError, short
from tasks.record import OUTSIDE_KEY, Record, library_versions
from tasks.stand_in import plannable
from tasks.text.loading import HUB_FILES, check_content, folder_hash, hub_snapshot, use_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Those of the modules in folders of their own, too.
ENCODER_FILES = [f"**/{name}" for name in HUB_FILES]


class Encoder(Record):
    """A sentence encoder: its id or folder, the hash of its files, and its libraries."""

    model: Annotated[str, OUTSIDE_KEY]
    content: str
    libraries: dict[str, str]


@plannable
def encoder_of(model: str) -> Encoder:
    """The encoder of this name. Raises InputError where there is none, or no extra `text`."""
    try:
        libraries = library_versions(("sentence-transformers", "torch", "transformers"))
    except PackageNotFoundError as error:
        raise InputError(
            "anchors.embedding: text needs the extra `text` (pip install -e '.[text]'), "
            "or use signature"
        ) from error
    content = folder_hash(encoder_folder(model), ENCODER_FILES)
    return Encoder(model=model, content=content, libraries=libraries)


def encoder_folder(model: str) -> Path:
    """The encoder's folder: the one named, or the local snapshot of a hub id (fetched once).

    Raises InputError where there is neither, or a module has no safetensors: a pickle would be
    read.
    """
    from tasks.lora.base import pickled_files

    folder = Path(model).expanduser()
    if not folder.is_dir():
        # The hub's patterns match whole paths: `*` stands for folders, too.
        folder = hub_snapshot("anchors.text_model", model, HUB_FILES)
    for file in pickled_files(folder):
        # OpenVINO's weights are called so, too; they are no pickle, and not read.
        if not any(file.parent.glob("*.safetensors")) and file.name != "openvino_model.bin":
            raise InputError(
                f"anchors.text_model {file}: a pickle is not read; save the encoder as safetensors"
            )
    return folder


def load_encoder(
    encoder: Encoder, compute: ComputeOptions
) -> Callable[[list[str]], NDArray[np.floating]]:
    """What gives the vectors [N, D] of texts.

    Raises InputError where the encoder cannot be loaded, or is another one by now.
    """
    from sentence_transformers import SentenceTransformer

    use_threads(encoder.model, compute)
    folder = encoder_folder(encoder.model)
    try:
        loaded = SentenceTransformer(
            str(folder),
            device=None if compute.device == "auto" else compute.device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:
        raise InputError(
            f"anchors.text_model {encoder.model}: cannot be loaded ({short(error)}); "
            "give a sentence-transformers id or folder, or `base` for the base model's own states"
        ) from error
    check_content(f"anchors.text_model {encoder.model}", folder, ENCODER_FILES, encoder.content)
    return partial(loaded.encode, batch_size=64, show_progress_bar=False, convert_to_numpy=True)
