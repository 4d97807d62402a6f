"""A user to forget, in Prefect: flow runs, with their task runs (named by anchors) and logs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from uuid import UUID

from tasks.errors import masked


def forget_in_prefect(
    flow_runs: Iterable[str], homes: Iterable[Path] = ()
) -> tuple[list[str], list[str]]:
    """Delete flow runs: (what was done, what is left), in lines.

    On the server that is set and in `homes`, where `mta run` may have its database. A run that none
    of them knows is left: it may be on another server.
    """
    from prefect.settings import PREFECT_API_URL

    from infra.local.alone import local_server

    wanted = {*flow_runs}
    unknown = set(wanted)
    places: list[str | Path] = [home for home in homes if (home / "prefect.db").exists()]
    if address := PREFECT_API_URL.value():
        places.insert(0, address)
    asked = []
    for place in places if wanted else []:
        try:
            with local_server(place) if isinstance(place, Path) else nullcontext():
                _delete(unknown)
            asked.append(f"unknown to {masked(str(place))}")
        except Exception as error:
            asked.append(f"{masked(str(place))} not reached ({type(error).__name__})")
    removed = len(wanted) - len(unknown)
    done = f"Prefect: {removed} flow runs removed, with the names and logs of their tasks"
    why = "; ".join(asked) or "no server is set"
    return [done] if removed else [], [
        f"Prefect: `prefect flow-run delete {run}` where it ran, unless it is gone there ({why})"
        for run in sorted(unknown)
    ]


def _delete(flow_runs: set[str]) -> None:
    """Delete those that the server knows, and take them out of the set."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for run in sorted(flow_runs):
            try:
                client.delete_flow_run(UUID(run))
            except ObjectNotFound:
                continue
            flow_runs.discard(run)
