"""Whether a result that Prefect kept is what a stage wrote: data, and no call of anything.

Prefect reads a record as the record itself says: as a pickle, or as JSON whose `__class__` may be
any function. So whoever can write to a store that is shared could run code here.
"""

from __future__ import annotations

import json
from typing import Any

from prefect.serializers import JSONSerializer

from tasks.record import Result


def as_written(record: bytes) -> bool:
    """Whether a record is plain JSON of results alone; one that is broken is not."""
    named: list[Any] = []

    def note(fields: dict[str, Any]) -> dict[str, Any]:
        named.extend(fields[key] for key in ("__class__", "__exc_type__") if key in fields)
        return fields

    try:
        whole = json.loads(record, object_hook=note)
        json.loads(whole["result"], object_hook=note)
        serializer = whole["metadata"]["serializer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in Result.__subclasses__()}
    return serializer == JSONSerializer().model_dump() and len(named) == 1 and named[0] in known
