"""The stage `compare` on headlines that are not in English."""

from __future__ import annotations

import pytest

from tasks.compare import compare
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import Rules, remarks, rules_of
from tasks.record import key_of
from tasks.results.models import Compared, Scored
from tests.unit.stages.answered import answered, prepared

# query -> user, gold; all are answered with the gold itself.
HEADLINES = {"a": ("u0", "भारत ने मैच जीता"), "b": ("u1", "今天天气好"), "c": ("u2", "Rain today")}
GROUPS = {"u0": "g0", "u1": "g1", "u2": "g2"}


def compared(rules: Rules) -> tuple[Compared, Scored]:
    golds = {query: gold for query, (_, gold) in HEADLINES.items()}
    methods = (answered("base", HEADLINES, golds),)
    found = compare(prepared("LaMP-4", GROUPS), methods, rules, "given")
    (scored,) = found.scored
    return found, scored


@pytest.mark.usefixtures("where")
def test_headlines_of_other_scripts() -> None:
    """By LaMP's rule one of three identical headlines counts, and it is said that two cannot."""
    lamp, scored = compared("lamp")
    assert scored.metrics == {"rouge1": pytest.approx(1 / 3), "rougeL": 1 / 3}
    assert (scored.users, scored.queries) == (3, 3)
    assert lamp.golds_without_token == 2
    assert "2 golds have no letter a to z and no digit" in remarks("lamp", 2)[0]
    # It decides nothing that is made of it.
    assert key_of(lamp) == key_of(lamp.model_copy(update={"golds_without_token": 0}))
    unicode, scored = compared("unicode")
    assert scored.metrics == {"rouge1": 1, "rougeL": 1}
    assert unicode.golds_without_token == 0
    for found, wanted in ((lamp, 1 / 3), (unicode, 1)):
        assert found.intervals["base"]["rougeL"].point == pytest.approx(wanted)


def test_tokens_are_of_text_alone() -> None:
    """Scores of labels are found again, whatever the tokens; by MTA's scorer there is no choice."""
    assert rules_of(get_task("LaMP-2M"), "lamp", "unicode") == "lamp"
    assert rules_of(get_task("LaMP-3"), "lamp", "unicode") == "lamp"
    assert rules_of(get_task("LaMP-5"), "lamp", "unicode") == "unicode"
    assert rules_of(get_task("LaMP-5"), "mta_published", "lamp") == "mta_published"
