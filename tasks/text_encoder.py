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

if TYPE_CHECKING:
    import numpy as np

Profile = list[dict[str, str]]


def encoder_folder(model: str) -> Path:
    """The encoder's folder, or the snapshot of a hub id, without a pickle that would be read.

    An encoder has modules in folders of their own, which take a pickle where no safetensors is.
    """
    from tasks.lora.adapters import pickled_files

    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # Both with and without a folder's name before the file's: `*` stands for any of it.
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    for file in pickled_files(folder):
        if not any(file.parent.glob("*.safetensors")):
            raise InputError(
                f"anchors.text_model {file}: a pickle is not read; save the encoder as safetensors"
            )
    return folder


def text_vectors(
    options: RunConfig, lamp_task: str, parts: Iterable[Sequence[Profile]]
) -> list[np.ndarray]:
    """Mean over items of the encoder's vector of the item's text and answer (METHOD, stage 1)."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            str(encoder_folder(options.anchors.text_model)),
            device=None if options.compute.device == "auto" else options.compute.device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except InputError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"anchors.text_model {options.anchors.text_model}: cannot be loaded ({why}); "
            "give a sentence-transformers id or folder, or `base` for the base model's own states"
        ) from error
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
