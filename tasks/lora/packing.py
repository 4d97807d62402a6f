"""Samples of many users as rows of one batch, with little padding.

Samples of like length get a row each, padded on the right: causal attention then needs no mask.
Samples of unlike length are laid end to end in a few rows of like length, with a block-diagonal
causal mask and positions that start anew with each sample. All users of a micro-batch have the
same number of rows of the same length, so users of similar size go together (`micro_batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tasks.errors import InputError
from tasks.lora.batches import Encoded

# Users' samples by the users' numbers, and some of one user's: the number, and which samples.
ByUser = Mapping[int, Sequence[Encoded]] | Sequence[Sequence[Encoded]]
Span = tuple[int, slice]

# Tokens of a row of several samples, about; as a limit, 0 means one sample per row.
ROW_TOKENS = 512
ONE_PER_ROW = 0
# One sample per row where that pads by at most this share; attention is cheaper so.
TOLERATED_PADDING = 0.08
# A micro-batch filled to the first share of the budget takes no user who would bring its padding
# over the second; a less full one does, as every pass has a cost of its own.
FILLED, MOST_PADDING = 1 / 32, 0.095


@dataclass(frozen=True)
class Packed:
    """U users as n rows each of T tokens, user-major, with N labels.

    input_ids, position_ids, segments [U * n, T]: segment 0 is padding. label, sample, user [N]: a
    label's token, the number of its sample, of its user. source [N]: the position that predicts it,
    in [U * n * T]. picks [U, M]: these positions user by user, filled up with the user's first one;
    slot [N]: a label's place in [U * M].
    """

    users: int
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    label: Tensor
    sample: Tensor
    user: Tensor
    picks: Tensor
    slot: Tensor
    tokens: int
    one_per_row: bool

    @property
    def padding(self) -> float:
        """Share of the batch's positions that hold no token."""
        return 1.0 - self.tokens / self.input_ids.numel()

    def mask(self, dtype: torch.dtype, additive: bool) -> Tensor:
        """[U * rows, 1, T, T], True (or 0) where the query may see the key, else False (or -inf).

        A padding position sees itself: a row of the mask with nothing in it makes NaN.
        """
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        same = self.segments[:, :, None] == self.segments[:, None, :]
        allowed = (same & causal)[:, None]
        if not additive:
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def to(self, device: torch.device) -> Packed:
        if device.type == "cpu":
            return self
        names = [field.name for field in fields(self) if field.type == "Tensor"]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return Packed(self.users, tokens=self.tokens, one_per_row=self.one_per_row, **moved)


def rows_of(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Samples of these lengths in as few rows of about `limit` tokens as hold them all.

    Each sample, longest first, goes to the row that holds least (Graham 1969: no row is longer
    than the mean row and one sample). ONE_PER_ROW: a row each.
    """
    if limit == ONE_PER_ROW:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = [[] for _ in range(max(1, -(-sum(lengths) // limit)))]
    held = [0] * len(rows)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = held.index(min(held))
        rows[place].append(index)
        held[place] += lengths[index]
    return [row for row in rows if row]


def layout(per_user: Sequence[Sequence[Encoded]]) -> int:
    """The row limit for these users' samples: ONE_PER_ROW, or ROW_TOKENS where that pads less."""
    tokens = padded = 0
    for samples in per_user:
        lengths = [_length(sample) for sample in samples]
        tokens += sum(lengths)
        padded += len(lengths) * max(lengths)
    return ONE_PER_ROW if padded * (1.0 - TOLERATED_PADDING) <= tokens else ROW_TOKENS


def footprint(samples: Sequence[Encoded], limit: int) -> tuple[int, int, int]:
    """(rows, tokens of the longest row, tokens of all) that one user's samples take."""
    lengths = [_length(sample) for sample in samples]
    rows = rows_of(lengths, limit)
    return len(rows), max(sum(lengths[i] for i in row) for row in rows), sum(lengths)


def micro_batches(sizes: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
    """Users, by their `footprint`, in micro-batches of at most `budget` positions (at least one).

    Sorted by size, so that little is padded; a new one begins where MOST_PADDING is passed.
    """
    order = sorted(range(len(sizes)), key=lambda u: (*sizes[u], u), reverse=True)
    batches: list[list[int]] = []
    held = 0
    for user in order:
        rows, _, tokens = sizes[user]
        if batches:
            # The first user of a micro-batch is its largest; users after it are padded to it.
            first_rows, first_length, _ = sizes[batches[-1][0]]
            positions = (len(batches[-1]) + 1) * first_rows * first_length
            small = positions <= FILLED * budget
            full = held + tokens >= (1.0 - MOST_PADDING) * positions
            if rows == first_rows and positions <= budget and (small or full):
                batches[-1].append(user)
                held += tokens
                continue
        batches.append([user])
        held = tokens
    return batches


def span_batches(samples: ByUser, limit: int, positions: int) -> list[list[Span]]:
    """The users' samples in micro-batches of at most `positions` (at least one sample).

    limit: the tokens of a row (`layout`). A user with too many samples is worked off in spans.
    """
    users = samples.keys() if isinstance(samples, Mapping) else range(len(samples))
    spans = [
        (user, span)
        for user in users
        for span in _fitting(samples[user], slice(0, len(samples[user])), limit, positions)
    ]
    sizes = [footprint(samples[user][span], limit) for user, span in spans]
    return [[spans[i] for i in batch] for batch in micro_batches(sizes, positions)]


def work_off(queue: list[list[Span]], samples: ByUser, work: Callable[[list[Span]], None]) -> int:
    """Do `work` batch by batch; halve those that do not fit in memory, and return how many did not.

    Raises InputError for a single sample that does not fit.
    """
    halved = 0
    while queue:
        batch = queue.pop(0)
        try:
            work(batch)
        except torch.OutOfMemoryError:
            halved += 1
            queue[:0] = _halved(batch, samples)
    return halved


def pack(per_user: Sequence[Sequence[Encoded]], pad: int, limit: int) -> Packed:
    """One packed batch of the users' samples; users with fewer rows get rows of padding."""
    plans = [rows_of([_length(sample) for sample in samples], limit) for samples in per_user]
    rows = max(len(plan) for plan in plans)
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    labels: list[tuple[int, int, int, int, int]] = []
    first = 0
    for user, (samples, plan) in enumerate(zip(per_user, plans, strict=True)):
        for number in range(rows):
            row: list[int] = []
            place: list[int] = []
            segment: list[int] = []
            for sample in plan[number] if number < len(plan) else []:
                prompt, answer = samples[sample].prompt, samples[sample].answer
                begin = len(row) + len(prompt)
                row += prompt
                row += answer
                length = len(prompt) + len(answer)
                place += range(length)
                segment += [sample + 1] * length
                for offset, token in enumerate(answer):
                    labels.append((len(ids), begin + offset - 1, token, first + sample, user))
            ids.append(row)
            positions.append(place)
            segments.append(segment)
        first += len(samples)
    width = max(1, max(len(row) for row in ids))
    filled = [
        torch.tensor([row + [fill] * (width - len(row)) for row in table], dtype=torch.long)
        for table, fill in ((ids, pad), (positions, 0), (segments, 0))
    ]
    flat = torch.tensor(labels, dtype=torch.long).reshape(-1, 5)
    source, owner = flat[:, 0] * width + flat[:, 1], flat[:, 4]
    counts = torch.bincount(owner, minlength=len(per_user))
    column = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[owner]
    picks = (torch.arange(len(per_user)) * rows * width)[:, None].repeat(1, int(counts.max()))
    picks[owner, column] = source
    return Packed(
        users=len(per_user),
        input_ids=filled[0],
        position_ids=filled[1],
        segments=filled[2],
        source=source,
        label=flat[:, 2],
        sample=flat[:, 3],
        user=owner,
        picks=picks,
        slot=owner * picks.shape[1] + column,
        tokens=sum(len(row) for row in ids),
        one_per_row=limit == ONE_PER_ROW,
    )


def _fitting(samples: Sequence[Encoded], span: slice, limit: int, positions: int) -> list[slice]:
    """The span, or its halves and theirs, so that each takes at most `positions`."""
    own = samples[span]
    if len(own) > 1:
        # Rows are laid out only where the tokens alone fit: that takes time for many samples.
        rows, length = 1, sum(map(_length, own))
        if length <= positions:
            rows, length, _ = footprint(own, limit)
        if rows * length > positions:
            return [
                part for half in _halves(span) for part in _fitting(samples, half, limit, positions)
            ]
    return [span] if own else []


def _halves(span: slice) -> list[slice]:
    middle = (span.start + span.stop) // 2
    return [slice(span.start, middle), slice(middle, span.stop)]


def _halved(batch: list[Span], samples: ByUser) -> list[list[Span]]:
    """The batch in two; a lone user's by the samples."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    user, span = batch[0]
    if span.stop - span.start == 1:
        raise InputError(
            f"out of memory: one sample of {_length(samples[user][span.start])} tokens does not "
            "fit on the device; lower base.max_tokens or set base.gradient_checkpointing"
        )
    return [[(user, half)] for half in _halves(span)]


def _length(sample: Encoded) -> int:
    return len(sample.prompt) + len(sample.answer)
