"""Generated LaMP files of any size: official questions and outputs in LaMP-3's shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = 30_000
# Where JSON has to escape: a line break, quotes, a letter outside ASCII; at these ranks.
ESCAPED = {100: "\\n", 150: '\\"great\\"', 200: "it\\u2019s"}
INSTRUCTION = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: "
)


def write_lamp3(folder: Path, users: int, items: int, seed: int = 0) -> int:
    """`dev_questions.json` and `dev_outputs.json` of `users` with `items` reviews each.

    Reviews of 30 to 140 words (550 characters on average), word frequencies as in language; user by
    user, so memory stays small. Returns the bytes of the questions.
    """
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = ["".join(generator.choice(letters, generator.integers(2, 10))) for _ in range(WORDS)]
    for rank, word in ESCAPED.items():
        words[rank] = word
    share = np.cumsum(1 / np.arange(1, WORDS + 1) ** 0.9)
    share /= share[-1]
    golds = []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "dev_questions.json").open("w", encoding="utf-8") as file:
        for user in range(users):
            ends = np.cumsum(generator.integers(30, 141, items + 1)).tolist()
            ranks = np.searchsorted(share, generator.random(ends[-1])).tolist()
            drawn = list(map(words.__getitem__, ranks))
            texts = [
                " ".join(drawn[start:end]) for start, end in zip([0, *ends], ends, strict=False)
            ]
            scores = generator.integers(1, 6, items + 1).tolist()
            golds.append({"id": str(user), "output": str(scores[-1])})
            profile = ", ".join(
                f'{{"text": "{text}", "score": "{score}", "id": "{user}{number:04d}"}}'
                for number, (text, score) in enumerate(zip(texts[:-1], scores[:-1], strict=True))
            )
            file.write("[" if user == 0 else ", ")
            file.write(f'{{"id": "{user}", "input": "{INSTRUCTION}{texts[-1]}", ')
            file.write(f'"profile": [{profile}]}}')
        file.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    return (folder / "dev_questions.json").stat().st_size
