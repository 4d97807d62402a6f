"""Users' texts as vectors, by a sentence encoder (the extra `text`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tasks.config.options import ComputeOptions
from tasks.errors import InputError, short
from tasks.lamp.definitions import LampTask
from tasks.record import OUTSIDE_KEY, Record, library_versions
from tasks.running.slots import gpu_slot
from tasks.stand_in import plannable
from tasks.text.loading import HUB_FILES, check_content, folder_hash, use_threads

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

Profile = list[dict[str, str]]
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
        from huggingface_hub import snapshot_download

        try:
            # Its patterns match whole paths: `*` stands for folders, too.
            folder = Path(snapshot_download(model, allow_patterns=HUB_FILES))
        except Exception as error:
            raise _not_loaded(model, error) from error
    for file in pickled_files(folder):
        # OpenVINO's weights are called so, too; they are no pickle, and not read.
        if not any(file.parent.glob("*.safetensors")) and file.name != "openvino_model.bin":
            raise InputError(
                f"anchors.text_model {file}: a pickle is not read; save the encoder as safetensors"
            )
    return folder


def text_vectors(
    encoder: Encoder, task: LampTask, parts: Iterable[Sequence[Profile]], compute: ComputeOptions
) -> list[np.ndarray]:
    """Mean over items of the vector of the item's text and answer (docs/method.md).

    Raises InputError where the encoder is another one by now.
    """
    import numpy as np

    use_threads(encoder.model, compute)
    vectors: list[np.ndarray] = []
    with gpu_slot():
        loaded = _load(encoder, compute.device)
        for part in parts:
            texts = [task.whole(item["text"], item["answer"]) for own in part for item in own]
            items = loaded.encode(
                texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True
            )
            ends = np.cumsum([len(profile) for profile in part])
            vectors += [own.mean(0) for own in np.split(items, ends[:-1])]
    return vectors


def _load(encoder: Encoder, device: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    folder = encoder_folder(encoder.model)
    try:
        loaded = SentenceTransformer(
            str(folder),
            device=None if device == "auto" else device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:
        raise _not_loaded(encoder.model, error) from error
    check_content(f"anchors.text_model {encoder.model}", folder, ENCODER_FILES, encoder.content)
    return loaded


def _not_loaded(model: str, error: Exception) -> InputError:
    return InputError(
        f"anchors.text_model {model}: cannot be loaded ({short(error)}); "
        "give a sentence-transformers id or folder, or `base` for the base model's own states"
    )
