"""What lines, names and saved configurations show: no passwords, one line, whatever the data."""

from __future__ import annotations

import netrc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.states import Failed
from pydantic import ValidationError

from flows.lamp_task import not_finite
from infra.command import say
from tasks.config import resolve
from tasks.errors import InputError, label, masked, printable
from tasks.lamp.download import transfer
from tasks.options import LampOptions
from tasks.stage import log, reason
from tasks.tracking import runs as tracking
from tasks.tracking.runs import Tracker

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
    lines = [both.out, both.err, str(InputError(url)), reason(Failed(message=url), "stage")]
    for line in lines:
        assert SECRET not in line
        assert "***@host" in line


def test_an_unreachable_mlflow_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    tracker = Tracker(resolve({}), "run", {})
    line = tracker.spool.behind() or ""
    assert line.startswith("MLflow at http://***@127.0.0.1:9 is behind (")
    assert SECRET not in line
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 3
    assert not any(SECRET in path.read_text() for path in kept)


def test_the_link_to_mlflow_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    tracker = object.__new__(Tracker)
    tracker.parent = "key"
    tracker.replay = SimpleNamespace(  # type: ignore[assignment]
        uri=tracking.tracking_uri(), experiment="1", known={"key": "2"}.get
    )
    assert (
        tracker.url == "http://***@host:5000/#/experiments/1/runs/2?workflowType=machine_learning"
    )
    assert tracking.tracking_uri().endswith("@host:5000")  # what connects still has it


def test_a_mirrors_password_comes_from_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Basic authentication of user "me" (RFC 7617: base64 of `user:password`), for that host."""
    file = tmp_path / "netrc"
    file.write_text(f"machine mirror.example login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(file))
    with transfer.client() as http:
        auth = http.auth
        assert auth is not None
        for host, wanted in (("mirror.example", "Basic bWU6aHVudGVyMg=="), ("other", None)):
            request = http.build_request("GET", f"https://{host}/x")
            sent = next(auth.sync_auth_flow(request))
            assert sent.headers.get("Authorization") == wanted


def test_a_broken_netrc_is_not_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine a login b\npasswort {SECRET}\n")
    monkeypatch.setenv("NETRC", str(file))
    with pytest.raises(netrc.NetrcParseError):
        netrc.netrc(str(file))
    with pytest.raises(InputError, match="cannot be read as netrc") as caught:
        transfer.client()
    assert SECRET not in str(caught.value)


def test_a_strange_id_stays_within_its_line() -> None:
    shard = {"value": {"users": ["a\nb"], "work": [{"failed": True, "steps": 3}]}}
    (line,) = not_finite("mta", [shard])  # type: ignore[list-item]
    assert r"user a\nb:" in line
