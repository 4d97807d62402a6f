"""What changed since the last run of the same configuration: scores, users, anchors.

The last run is found in `.mta/runs` of this machine. It counts as the same configuration where
nothing differs but where it ran: the scheduled run, week after week, and its data under one path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from tasks.errors import InputError, label
from tasks.methods import METHODS
from tasks.prepare import each_user
from tasks.questions import content
from tasks.report.files import run_files
from tasks.report.page import row, section, small, table, tag
from tasks.stage import log
from tasks.store.artifacts import Store
from tasks.store.pieces import digest

VERSION = 1
ROLES = {"base": "base users", "anchor": "anchor candidates", "few_shot": "few-shot users"}
# What of a configuration decides no result.
ELSEWHERE = ("compute", "plan", "dry_run")
SHOWN_IDS = 10
KINDS = ("added", "removed", "changed")


def last_run(where: Store, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file of the run of this configuration that ended last, None where there is none."""
    for file in run_files(where):
        try:
            run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if run["about"] and _deciding(run["config"]) == _deciding(config):
                return run
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of an earlier version, or being removed
    return None


def since(
    where: Store, config: Mapping[str, Any], summaries: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What is another than in the last run of `config`, None without one.

    `scores`: per LaMP task, seed and method the `score` then and now, estimates as in data.py or
    None. `users`: per LaMP task and seed, for each role that differs, ids `added`, `removed` and
    `changed` in content. `anchors`: the same of each bank's, by method; `changed` is trained again.
    `unknown`: LaMP tasks of which the last run says nothing, or its users are no longer known.
    To be asked before this run is written down. Users are remembered by hashes of their content.
    What goes wrong here is logged and costs no scores.
    """
    try:
        return _since(where, config, summaries)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        log(f"what changed since the last run is not known ({why})", warning=True)
        return None


def _since(
    where: Store, config: Mapping[str, Any], summaries: list[dict[str, Any]]
) -> dict[str, Any] | None:
    users = {id(one): _fingerprints(where, one["prepared"]) for one in summaries}
    last = last_run(where, config)
    if last is None:
        return None
    found: dict[str, Any] = {"run": last["about"], "scores": [], "users": [], "anchors": []}
    unknown: list[str] = []
    for one in summaries:
        cell = {"lamp_task": one["lamp_task"], "seed": one["seed"]}
        then = last["seeds"].get(str(one["seed"]), {}).get(one["lamp_task"])
        scores = _scores(then or {})
        for method, now in _scores(one).items():
            found["scores"].append(
                {**cell, "method": method, "then": scores.get(method), "now": now}
            )
        if then is None:
            unknown.append(one["lamp_task"])
            continue
        try:
            before = _fingerprints(where, then["prepared"])
        except (InputError, OSError):
            unknown.append(one["lamp_task"])
        else:
            for role, now in users[id(one)].items():
                found["users"].append({**cell, "role": role, **_changes(before[role], now)})
        for method, own in one["banks"].items():
            trained = _anchors(then["banks"].get(method))
            found["anchors"].append({**cell, "method": method, **_changes(trained, _anchors(own))})
    for kind in ("users", "anchors"):
        found[kind] = [one for one in found[kind] if any(one[name] for name in KINDS)]
    return found | {"unknown": sorted(set(unknown))}


def since_lines(found: dict[str, Any] | None) -> list[str]:
    """The same in lines for the table; scores are named where they moved."""
    if found is None:
        return []
    head = f"since the run {found['run']['name']} of {found['run']['date']}"
    lines = [f"{head}: {text}" for text in _told(found)]
    moved = [one for one in found["scores"] if one["then"] != one["now"]]
    lines += [
        f"{head}: {_cell(found, one)}, {one['method']}: score {_estimate(one['then'])} -> "
        f"{_estimate(one['now'])}"
        for one in moved
    ]
    return [*lines, *([] if moved else [f"{head}: no score moved"])]


def since_section(found: dict[str, Any] | None) -> str:
    """The same as a section of the page, with every score."""
    if found is None:
        return ""
    head = ["<th class='text'>LaMP task</th>", "<th class='text'>method</th>",
            "<th>then</th>", "<th>now</th>", "<th>change</th>"]  # fmt: skip
    lines = []
    for one in found["scores"]:
        cells = [
            tag("th", escape(_cell(found, one)), scope="row"),
            tag("td", escape(one["method"]), class_="text"),
        ]
        for when in ("then", "now"):
            shown, interval = _parts(one[when])
            cells.append(
                tag(
                    "td", escape(shown) + (small(interval) if interval else ""), data_since=when,
                    data_task=one["lamp_task"], data_seed=one["seed"], data_method=one["method"],
                )
            )  # fmt: skip
        lines.append(row([*cells, tag("td", _change(one["then"], one["now"]))]))
    told = "".join(f"<li>{escape(text)}</li>" for text in _told(found))
    about = found["run"]
    return section(
        "Since the last run of this configuration",
        f"<p>{escape(about['name'])}, {escape(about['date'])}. The intervals are each run's own; "
        "two runs share most of their users, so the change has none.</p>",
        f'<ul class="notes" id="since">{told}</ul>',
        table(head, lines),
    )


def _told(found: dict[str, Any]) -> list[str]:
    lines = [f"{one}: the last run's users are not known" for one in found["unknown"]]
    for one in found["users"]:
        lines.append(f"{_cell(found, one)}, {ROLES[one['role']]}: {_counts(one, KINDS)}")
    for one in found["anchors"]:
        words = ("new", "replaced", "trained again")
        lines.append(f"{_cell(found, one)}, {one['method']}, anchors: {_counts(one, words)}")
    return lines or ["users and anchors are the same"]


def _counts(one: Mapping[str, Any], words: Iterable[str]) -> str:
    parts = []
    for kind, word in zip(KINDS, words, strict=True):
        if ids := one[kind]:
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            parts.append(f"{len(ids)} {word} ({', '.join(map(label, ids[:SHOWN_IDS]))}{more})")
    return "; ".join(parts)


def _cell(found: dict[str, Any], one: Mapping[str, Any]) -> str:
    several = len({each["seed"] for each in found["scores"]}) > 1
    return f"{one['lamp_task']}, seed {one['seed']}" if several else str(one["lamp_task"])


def _estimate(one: Mapping[str, float | None] | None) -> str:
    return " ".join(part for part in _parts(one) if part)


def _parts(one: Mapping[str, float | None] | None) -> tuple[str, str]:
    """Point and interval as they are read."""
    if one is None or one["point"] is None:
        return "-", ""
    if one["lo"] is None or one["hi"] is None:
        return f"{one['point']:.3f}", ""
    return f"{one['point']:.3f}", f"[{one['lo']:.3f}, {one['hi']:.3f}]"


def _change(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    before, after = (then or {}).get("point"), (now or {}).get("point")
    return "-" if before is None or after is None else f"{after - before:+.3f}"


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ELSEWHERE}


def _scores(cell: Mapping[str, Any]) -> dict[str, Any]:
    """method -> its `score`; of methods, not of the optimum."""
    compared = cell.get("compared")
    intervals = compared["value"]["intervals"] if compared else {}
    return {name: own["score"] for name, own in intervals.items() if name in METHODS}


def _anchors(bank: Mapping[str, Any] | None) -> dict[str, str]:
    """Anchor -> the hash of its LoRA."""
    return {a: one["ref"]["sha256"] for a, one in (bank["meta_loras"] if bank else {}).items()}


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str]]:
    return {
        "added": sorted(now.keys() - then.keys()),
        "removed": sorted(then.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & then.keys() if now[name] != then[name]),
    }


def _fingerprints(where: Store, prepared: dict[str, Any]) -> dict[str, dict[str, str]]:
    """role -> user_id -> hash of the user's history and queries; read once per `prepare` result."""

    def make(_out: Path) -> dict[str, Any]:
        return {
            role: {
                user["user_id"]: digest(
                    [content(user["profile"])]
                    + [[item["id"], item["input"], item["gold"]] for item in user["query"]]
                )[:16]
                for user in each_user(where, prepared, role)
            }
            for role in ROLES
        }

    key = digest({"version": VERSION, "prepared": prepared["ref"]["sha256"]})
    return where.get("fingerprints", key, make).value
