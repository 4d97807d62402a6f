"""The blocks of README and docs/, and the commands in them, as a reader types them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise

SHELL = ("", "sh", "shell", "bash")


def fenced(text: str) -> list[tuple[str, str, str]]:
    """What stands before each fenced block, since the block before it; its language; its text."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return list(zip(parts[::3], parts[1::3], parts[2::3], strict=False))


def indented(text: str) -> list[str]:
    """The indented blocks: of most pages commands, of the tutorial what they print."""
    bare = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"(?:^    .*\n)+", bare, re.M)


def commands(blocks: list[str]) -> Iterator[list[str]]:
    """The words of each command."""
    for block in blocks:
        waiting = ""
        for line in block.splitlines():
            waiting += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
            try:
                words = [] if line.endswith("\\") else shlex.split(waiting, comments=True)
            except ValueError:
                continue  # a quoted text goes on in the next line
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.S):
                words.pop(0)  # set for this command alone
            if words:
                yield words
                waiting = ""


def parameters(words: list[str]) -> list[str]:
    """The values of `-p`."""
    return [after for word, after in pairwise(words) if word == "-p"]
