"""Which files of a folder hold LaMP data, and who is in them, by their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tasks.errors import InputError

ROLE_FILE_NAMES: dict[str, tuple[str, ...]] = {
    "base": ("user_base_LLM.json",),
    "anchor": ("user_anchor_candidate.json",),
    "few_shot": (
        "user_few_shot.json",
        "user_test_100.json",
        "test_100.json",
        "test_100/user_test_100.json",
        "test_100/test_100.json",
    ),
}
# LaMP withholds the golds of its test split, so it is never read.
SPLITS = ("dev", "train")


@dataclass(frozen=True)
class Files:
    """Either user files, each with the role of its users (None: not said), or LaMP's own
    questions and outputs."""

    users: list[tuple[str | None, Path]] = field(default_factory=list)
    official: tuple[Path, Path] | None = None


def find_files(path: Path) -> Files:
    """The files to read: `path` itself, or those of the folder that it is.

    Raises InputError where there is none, or more than can be meant.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; check the path of the data")
    if path.is_file():
        return Files(users=[(None, path)])
    users: list[tuple[str | None, Path]] = []
    for role, names in ROLE_FILE_NAMES.items():
        found = [name for name in names if (path / name).is_file()]
        if len(found) > 1:
            raise InputError(f"{path}: {' and '.join(found)} both hold {role} users; keep one")
        users += [(role, path / name) for name in found]
    questions = [path / f"{split}_questions.json" for split in SPLITS]
    official = [file for file in questions if file.is_file()]
    if users and official:
        raise InputError(
            f"{path}: holds both {users[0][1].name} and {official[0].name}; keep the user "
            "files and LaMP's own files in different folders"
        )
    if official:
        outputs = official[0].with_name(official[0].name.replace("_questions", "_outputs"))
        return Files(official=(official[0], outputs))
    if not users:
        wanted = [name for group in ROLE_FILE_NAMES.values() for name in group]
        hint = ""
        if (path / "test_questions.json").is_file():
            hint = " (LaMP withholds the golds of test_questions.json: use its dev split)"
        raise InputError(
            f"{path}: holds no LaMP data; expected {', '.join(wanted)}, or dev_questions.json "
            f"and dev_outputs.json{hint}"
        )
    return Files(users=users)
