"""Users' texts as vectors, by a sentence encoder (the extra `text`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.base_model import HUB_FILES, use_threads
from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.stage import gpu_slot
from tasks.store.artifacts import Store

if TYPE_CHECKING:
    import numpy as np

Profile = list[dict[str, str]]


def encoder_folder(model: str) -> Path:
    """The encoder's folder: the one named, or the local snapshot of a hub id (fetched once).

    Raises InputError where there is neither, or a pickle would be read: an encoder has modules in
    folders of their own, which take one where no safetensors is.
    """
    from tasks.lora.adapters import pickled_files

    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            # Both with and without a folder's name before the file's: `*` stands for any of it.
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


def encoder_hash(where: Store, folder: Path) -> str:
    """sha256 over the encoder's files, those of the modules in folders of their own, too."""
    return where.hash_folder(folder, [f"**/{name}" for name in HUB_FILES])


def text_vectors(
    options: RunConfig,
    lamp_task: str,
    parts: Iterable[Sequence[Profile]],
    where: Store,
    content: str,
) -> list[np.ndarray]:
    """Mean over items of the vector of the item's text and answer (METHOD, stage 1).

    By the encoder of the hash `content`; raises InputError where it is another one by now.
    """
    import numpy as np
    from sentence_transformers import SentenceTransformer

    folder = encoder_folder(options.anchors.text_model)
    try:
        encoder = SentenceTransformer(
            str(folder),
            device=None if options.compute.device == "auto" else options.compute.device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:
        raise _not_loaded(options.anchors.text_model, error) from error
    if encoder_hash(where, folder) != content:
        raise InputError(
            f"anchors.text_model {options.anchors.text_model}: {folder} is not the encoder that "
            "this run began with; start the run again"
        )
    task = get_task(lamp_task)
    use_threads(options)
    vectors: list[np.ndarray] = []
    with gpu_slot():
        for part in parts:
            texts = [task.whole(item["text"], item["answer"]) for own in part for item in own]
            items = encoder.encode(
                texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True
            )
            ends = np.cumsum([len(profile) for profile in part])
            vectors += [own.mean(0) for own in np.split(items, ends[:-1])]
    return vectors


def _not_loaded(model: str, error: Exception) -> InputError:
    why = " ".join(str(error).split())[:200]
    return InputError(
        f"anchors.text_model {model}: cannot be loaded ({why}); "
        "give a sentence-transformers id or folder, or `base` for the base model's own states"
    )
