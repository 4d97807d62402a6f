"""Samples of many users as rows of one batch, with little padding.

Samples of similar length get a row each, padded on the right: causal attention then needs no mask.
Others are laid end to end in a few rows of similar length, with a block-diagonal causal mask and
positions that start anew with each sample. All users of a micro-batch have the same number of rows
of the same length, so users of similar size share one (`micro_batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from tasks.errors import InputError
from tasks.lora.batches import Encoded, PerUser

# Users' samples by the users' numbers. Some of one user's samples: the number, and which they are.
ByUser = Mapping[int, Sequence[Encoded]]
Span = tuple[int, slice]

# The row limit: about how many tokens a row of several samples has. Two limits are special: one
# sample per row; all of a user's samples in one row (only with `use_varlen`, without choices).
ROW_TOKENS = 512
ONE_PER_ROW, ONE_PER_USER = 0, 2**40
# One sample per row where that pads by at most this share; attention is cheaper so.
TOLERATED_PADDING = 0.08
# A micro-batch above the first share of the budget takes no user who would raise its padding above
# the second. A smaller one takes any user, as every pass has a fixed cost.
FILLED, MOST_PADDING = 1 / 32, 0.095


@dataclass(frozen=True)
class Packed:
    """U users as n rows each of T tokens, user-major, with N labels.

    input_ids, position_ids, segments, branches [U * n, T]: segment 0 is padding; branch 0 is seen
    by all of its segment, any other (a choice) by itself only. label, sample, user [N]: a label's
    token, the number of its sample (a choice counts as one), of its user. source [N]: the position
    that predicts it, in [U * n * T]. picks [U, M]: these positions user by user, filled up with
    the user's position 0; slot [N]: a label's place in [U * M]. ends [S + 1] int32: 0, then the
    ends of samples and of rows in [U * n * T]; longest: the most tokens from one to the next. Both
    for ONE_PER_USER only; else no ends, and 0.
    """

    users: int
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    branches: Tensor
    source: Tensor
    label: Tensor
    sample: Tensor
    user: Tensor
    picks: Tensor
    slot: Tensor
    ends: Tensor
    longest: int
    tokens: int
    one_per_row: bool

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[U * rows, 1, T, T]: 0 where the query may see the key, else the lowest number.

        It is added to attention's scores, which every attention of transformers takes. A padding
        position sees itself: a query without any key would make NaN.
        """
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        same = self.segments[:, :, None] == self.segments[:, None, :]
        branch = self.branches[:, None, :]
        seen = (branch == 0) | (branch == self.branches[:, :, None])
        allowed = (same & causal & seen)[:, None]
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def to(self, device: torch.device) -> Packed:
        if device.type == "cpu":
            return self
        names = [field.name for field in fields(self) if field.type == "Tensor"]
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def rows_of(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Samples of these lengths (their numbers) in as few rows of about `limit` tokens as hold them.

    Each sample, longest first, goes to the row that holds least (Graham 1969: no row is longer
    than the mean row and one sample together). ONE_PER_ROW: a row each.
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


def layout(per_user: Iterable[Sequence[Encoded]]) -> int:
    """The row limit for these users' samples: ROW_TOKENS if ONE_PER_ROW would pad too much."""
    tokens = padded = 0
    for samples in per_user:
        lengths = [sample.length for sample in samples]
        tokens += sum(lengths)
        padded += len(lengths) * max(lengths, default=0)
    return ONE_PER_ROW if padded * (1.0 - TOLERATED_PADDING) <= tokens else ROW_TOKENS


def footprint(samples: Sequence[Encoded], limit: int) -> tuple[int, int, int]:
    """(rows, tokens of the longest row, tokens of all samples) of one user."""
    lengths = [sample.length for sample in samples]
    rows = rows_of(lengths, limit)
    return len(rows), max(sum(lengths[i] for i in row) for row in rows), sum(lengths)


def micro_batches(sizes: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
    """Users, by their `footprint`, in micro-batches of at most `budget` positions (at least one).

    Users are sorted by size, so that little is padded.
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

    limit: the tokens of a row (`layout`). A user with too many samples is split into spans.
    """
    spans: list[Span] = []
    sizes = []
    waiting = [(user, slice(0, len(of_user))) for user, of_user in samples.items() if of_user]
    while waiting:
        user, span = waiting.pop(0)
        part = samples[user][span]
        # Rows are laid out only if the tokens alone fit: for many samples that takes time.
        tokens = sum(sample.length for sample in part)
        if len(part) == 1 or tokens <= positions:
            size = footprint(part, limit)
            if len(part) == 1 or size[0] * size[1] <= positions:
                spans.append((user, span))
                sizes.append(size)
                continue
        waiting[:0] = _halves(user, span)
    return [[spans[i] for i in batch] for batch in micro_batches(sizes, positions)]


def work_off(queue: list[list[Span]], samples: ByUser, work: Callable[[list[Span]], None]) -> int:
    """Do `work` batch by batch. Halve a batch that does not fit in memory; return how many did not.

    Raises InputError for a single sample that does not fit.
    """
    halved = 0
    while queue:
        batch = queue.pop(0)
        try:
            work(batch)
            continue
        except torch.OutOfMemoryError:
            halved += 1
        # Not in `except`: there the error still holds the pass's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        user, span = batch[0]
        if len(batch) > 1:
            queue[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        elif span.stop - span.start > 1:
            queue[:0] = [[half] for half in _halves(user, span)]
        else:
            raise InputError(
                f"out of memory: one sample of {samples[user][span.start].length} tokens does not "
                "fit on the device; lower base.max_tokens or set base.gradient_checkpointing"
            )
    return halved


def _halves(user: int, span: slice) -> list[Span]:
    middle = (span.start + span.stop) // 2
    return [(user, slice(span.start, middle)), (user, slice(middle, span.stop))]


def pack(per_user: PerUser, pad: int, limit: int) -> Packed:
    """One packed batch of the users' samples; users with fewer rows get rows of padding."""
    # Each sample, user by user, with its user, first number, row, and beginning in the row.
    places: list[tuple[Encoded, int, int, int, int]] = []
    plans = [rows_of([sample.length for sample in samples], limit) for samples in per_user]
    rows, first, width = max(map(len, plans)), 0, 1
    for user, (samples, plan) in enumerate(zip(per_user, plans, strict=True)):
        numbers = [*accumulate((len(one.choices) or 1 for one in samples), initial=first)]
        for row, chosen in enumerate(plan, user * rows):
            begin = 0
            for index in chosen:
                places.append((samples[index], user, numbers[index], row, begin))
                begin += samples[index].length
            width = max(width, begin)
        first = numbers[-1]
    ids = np.full((len(plans) * rows, width), pad)
    positions, segments, branches = np.zeros_like(ids), np.zeros_like(ids), np.zeros_like(ids)
    labels: list[tuple[int, int, int, int]] = []
    for sample, user, number, row, begin in places:
        place = (row, slice(begin, begin + sample.length))
        segments[place] = number + 1
        if sample.choices:
            ids[place], positions[place], branches[place], predicted = _branched(sample)
        else:
            ids[place] = sample.prompt + sample.answer
            positions[place] = np.arange(sample.length)
            before = len(sample.prompt) - 1
            predicted = [(before + n, token, 0) for n, token in enumerate(sample.answer)]
        labels += [(row * width + begin + n, token, number + m, user) for n, token, m in predicted]
    ends: list[int] = []
    if limit == ONE_PER_USER:
        borders = {row * width + at for one, _, _, row, begin in places
                   for at in (begin, begin + one.length)}  # fmt: skip
        ends = sorted(borders | set(range(0, ids.size + 1, width)))
    source, label, of_sample, owner = torch.tensor(labels).reshape(-1, 4).long().T.contiguous()
    counts = torch.bincount(owner, minlength=len(plans))
    column = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    picks = (torch.arange(len(plans)) * rows * width)[:, None].repeat(1, int(counts.max()))
    picks[owner, column] = source
    return Packed(
        users=len(plans),
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        branches=torch.from_numpy(branches),
        source=source,
        label=label,
        sample=of_sample,
        user=owner,
        picks=picks,
        slot=owner * picks.shape[1] + column,
        ends=torch.tensor(ends, dtype=torch.int32),
        longest=max((b - a for a, b in pairwise(ends)), default=0),
        tokens=sum(sample.length for sample, *_ in places),
        one_per_row=limit == ONE_PER_ROW and not any(sample.choices for sample, *_ in places),
    )


def _branched(
    sample: Encoded,
) -> tuple[list[int], list[int], list[int], list[tuple[int, int, int]]]:
    """A prompt with its choices after it: ids, positions, branches. And of each label the place
    that predicts it, its token, and the number of its choice."""
    end = len(sample.prompt)
    ids, positions, branches = [*sample.prompt], [*range(end)], [0] * end
    labels = []
    for number, choice in enumerate(sample.choices):
        sources = [end - 1, *range(len(ids), len(ids) + len(choice) - 1)]
        labels += [(n, token, number) for n, token in zip(sources, choice, strict=True)]
        ids += choice[:-1]
        positions += range(end, end + len(choice) - 1)
        branches += [number + 1] * (len(choice) - 1)
    return ids, positions, branches, labels
