"""Find the files of a folder that hold LaMP data, and their role, by their names."""

from pathlib import Path
from typing import NamedTuple

from tasks.errors import InputError
from tasks.lamp.definitions import TASKS

ROLE_FILE_NAMES: dict[str, tuple[str, ...]] = {
    "base": ("user_base_LLM",),
    "anchor": ("user_anchor_candidate",),
    "few_shot": (
        "user_few_shot",
        "user_test_100",
        "test_100",
        "test_100/user_test_100",
        "test_100/test_100",
    ),
}
# The sides of the experiment.
ROLES = tuple(ROLE_FILE_NAMES)
# JSON lists and JSON Lines may both be called either.
SUFFIXES = (".json", ".jsonl")
# LaMP withholds the golds of its test split, so it is never read.
SPLITS = ("dev", "train")


class UserFile(NamedTuple):
    """A file of users. role: of all of them. outputs: the golds of LaMP's own questions."""

    path: Path
    role: str | None = None
    outputs: Path | None = None


def of_task(data: Path, name: str) -> Path:
    """Return the folder or file in `data` that is named after a LaMP task, or else `data` itself.

    Raises InputError where several are.
    """
    named = [data / name] if (data / name).is_dir() else []
    named += [file for suffix in SUFFIXES if (file := data / f"{name}{suffix}").is_file()]
    if len(named) > 1:
        names = " and ".join(path.name for path in named)
        raise InputError(f"{data}: {names} both hold users of {name}; keep one")
    return named[0] if named else data


def find_files(path: Path) -> list[UserFile]:
    """Return the files to read: `path` itself, or those in the folder `path`.

    Raises InputError for no file, or files that exclude each other.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; check the path of the data")
    if path.is_file():
        return [UserFile(path)]
    users: list[UserFile] = []
    for role, stems in ROLE_FILE_NAMES.items():
        names = [f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        present = [name for name in names if (path / name).is_file()]
        if len(present) > 1:
            raise InputError(f"{path}: {' and '.join(present)} both hold {role} users; keep one")
        users += [UserFile(path / name, role) for name in present]
    for split in SPLITS:
        questions = path / f"{split}_questions.json"
        if questions.is_file() and users:
            raise InputError(
                f"{path}: holds both {users[0].path.name} and {questions.name}; keep the user "
                "files and LaMP's own files in different folders"
            )
        if questions.is_file():
            return [UserFile(questions, outputs=path / f"{split}_outputs.json")]
    return users or [UserFile(_plain(path))]


def _plain(folder: Path) -> Path:
    """Return the only file of users in a folder, whatever its name."""
    others = {*TASKS} - {folder.name}
    plain = [
        file
        for file in sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
        if file.stem not in others and not file.stem.endswith(("_questions", "_outputs"))
    ]
    if len(plain) == 1:
        return plain[0]
    hint = f" (it holds {', '.join(file.name for file in plain[:5])})" if plain else ""
    if (folder / "test_questions.json").exists():
        hint = " (LaMP withholds the golds of test_questions.json: use its dev split)"
    wanted = [f"{stem}.json" for group in ROLE_FILE_NAMES.values() for stem in group]
    raise InputError(
        f"{folder}: holds no LaMP data; expected {', '.join(wanted)}, or dev_questions.json and "
        f"dev_outputs.json, or one file of users alone{hint}"
    )
