"""What lines, names and saved configurations show: no passwords, one line, whatever the data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.command import say
from tasks.config.run import resolve
from tasks.errors import InputError, label, masked, printable, short
from tasks.lamp.options import LampOptions
from tasks.log import log
from tasks.tracking.runs import reason

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://me:hun@ter2@db/mta", "postgresql+psycopg://***@db/mta"),
        ("two: http://a:b@c and https://d@e/f", "two: http://***@c and https://***@e/f"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("mail a@b, see http://c", "mail a@b, see http://c"),
    ],
)
def test_credentials_of_urls_are_masked(text: str, wanted: str) -> None:
    assert masked(text) == wanted


def test_an_error_within_a_message_is_masked_before_it_is_cut() -> None:
    """The cut goes through the URL: what is left of the password would be no URL's any more."""
    told = short(OSError(f"no answer\n  from http://me:{SECRET}@host/x"), 33)
    assert told == "no answer from http://***@host/x"
    assert (
        short(OSError(f"no answer from http://me:{SECRET}@host/x"), 22) == "no answer from http://"
    )
    assert SECRET[:4] not in short(OSError(f"no answer from http://me:{SECRET}@host/x"), 30)


@given(st.text())
def test_any_id_is_shown_in_one_short_printable_line(identifier: str) -> None:
    shown = label(identifier)
    assert shown.isprintable()
    assert len(shown) <= 80
    assert "\n" not in str(InputError(identifier))


def test_ids_that_differ_keep_names_that_differ() -> None:
    long = "x" * 500
    assert label(long + "a") != label(long + "b")
    assert label("../../x") == "../../x"
    # NUL, a line end and U+202E, which shows what follows from right to left.
    assert label("a\0b\nc\u202ed") == r"a\x00b\nc\u202ed"
    # Latin and Cyrillic a: letters, so data; two ids, two names.
    assert label("\u0430nna") != label("anna")
    assert printable("Zoë 猫") == "Zoë 猫"


@pytest.mark.parametrize("option", ["lamp", "base"])
def test_a_password_in_the_configuration_is_refused_and_not_repeated(option: str) -> None:
    """A configuration is saved with the run, in Prefect, MLflow and the report."""
    url = f"https://me:{SECRET}@mirror.example/LaMP"
    given = {"lamp": {"lamp": {"url": url}}, "base": {"model": url}}[option]
    with pytest.raises(InputError) as caught:
        resolve(given)
    assert SECRET not in str(caught.value)
    assert {"lamp": "lamp.url", "base": "base.model"}[option] in str(caught.value)


def test_prefect_refuses_such_a_url_by_the_flows_schema() -> None:
    """The pattern is part of the parameters' JSON schema: nothing of it gets into a database."""
    with pytest.raises(ValidationError):
        LampOptions(url=f"https://me:{SECRET}@mirror.example/LaMP")
    assert "@" in LampOptions.model_json_schema()["properties"]["url"]["pattern"]
    assert LampOptions(url="https://mirror.example/a@b").url == "https://mirror.example/a@b"


def test_lines_and_errors_mask_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://me:{SECRET}@host"
    log(f"a line about {url}")
    say(f"MLflow {url}")
    both = capsys.readouterr()
    lines = [both.out, both.err, str(InputError(url)), reason(ValueError(url))]
    for line in lines:
        assert SECRET not in line
        assert "***@host" in line
