"""New users of a finished run: their folders in stock PEFT, their recipes, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import LoraBatch, read_peft
from tasks.lora.bank import stack
from tasks.lora.grouped import assigned, grouped
from tasks.personalise import new_users
from tasks.personalise.ask import ask
from tasks.personalise.new_users import histories, personalise
from tasks.personalise.personaliser import Personal, Personaliser, folded
from tasks.prepare import prepared_users
from tasks.recipes import read_recipes
from tasks.report.files import write_run
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.tools.main import main
from tasks.users import users_of
from tests.official import write_official
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import largest_difference
from tests.unit.stages import pipeline
from tests.unit.stages.pipeline import ROLES, predictions, stock_answers
from tests.unit.stages.users import user

# What may change a recipe or a LoRA: the model adapted to the task, history in prompts, evidence.
RICH: dict[str, Any] = {
    "base": {"task_adapt": {"enabled": True, "train_on": "profile", "rank": 2, "epochs": 1}},
    "prompt": {"style": "published", "history_items": 1},
    "anchors": pipeline.OPTIONS["anchors"] | {"embedding": "input_signature"},
    "fusion": {
        "top_m": 2,
        "weights": "evidence",
        "vectors": True,
        "shortlist": 2,
        "merge": "factors",
    },
    "split": {"few_shot_items": 3},
}
NEW = [user(f"new-{n}", 3 + n) for n in range(3)]


def saved(cell: Cell, name: str) -> Run:
    about = {"date": "2026-11-29 07:00", "report": name, "config": {}}
    made = Run(id=name, name=name, cells=(cell,), **about)
    write_run(made)
    return made


@pytest.fixture(scope="module")
def plain(first: Cell) -> Run:
    return saved(first, "plain")


@pytest.fixture(scope="module", params=["plain", "rich"])
def finished(request: pytest.FixtureRequest, place: Path, plain: Run) -> Run:
    return plain if request.param == "plain" else saved(pipeline.run(place, ROLES, **RICH), "rich")


def written(file: Path, users: list[Any]) -> Path:
    file.write_text(json.dumps(users))
    return file


def told(run: Run, file: Path, to: Path) -> tuple[list[str], list[str]]:
    """The lines of users that were made, and of those that were not."""
    lines = list(personalise(Finished(run), file, to))
    bad = [str(line) for line in lines if isinstance(line, InputError)]
    return [line for line in lines if isinstance(line, str)], bad


def engine_logits(personaliser: Personaliser, personal: Personal, ids: torch.Tensor) -> Any:
    """As the engine has them: merged and stacked apart, in grouped layers."""
    assert personal.merged
    assert personal.stacked
    both: list[LoraBatch] = [stack(["one"], [one]) for one in personal.loras]
    model = personaliser.model.base.model
    with torch.no_grad(), grouped(model, [*both[0].layers]) as layers, assigned(layers, *both):
        return model(input_ids=ids).logits


def test_stock_peft_loads_the_folders(place: Path, finished: Run, tmp_path: Path) -> None:
    """Three users never seen, and one without a history, whose folder is the base model."""
    (cell,) = finished.cells
    file = written(tmp_path / "users.json", [*NEW, {"user_id": "nobody", "profile": []}])
    lines, bad = told(finished, file, tmp_path / "to")
    assert bad == []
    assert [line.split(": ")[1].split()[0].rstrip(",") for line in lines] == [
        "new-0", "new-1", "new-2", "nobody",
    ]  # fmt: skip
    shown = "3 of 5" if cell.config.split.few_shot_items else "5"
    assert f"new-2, by {shown} items, merged from 2 anchors, most of anchor-" in lines[2]
    assert lines[3].endswith("nobody has an empty history and gets the base model as it is")
    personaliser = Personaliser(cell)
    users = histories(cell, file)
    made = personaliser([new_users.as_user(one) for one in users])
    ids = torch.arange(3, 43)[None]
    seen = []
    for one in made:
        folder = tmp_path / "to" / one.user_id
        assert json.loads((folder / "mta.json").read_text())["user"] == one.user_id
        base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        with torch.no_grad():
            stock = PeftModel.from_pretrained(base, folder)(ids).logits
            bare = personaliser.model.base.model(ids).logits
        engine = engine_logits(personaliser, one, ids) if one.recipe else bare
        assert (stock - engine).abs().max() < 1e-4
        seen.append(float((engine - bare).abs().max()))
    assert min(seen[:3]) > 1e-2
    assert {file.name for file in (tmp_path / "to").iterdir()} == {one.user_id for one in made}


def test_few_shot_users_get_their_recipes_again(finished: Run, tmp_path: Path) -> None:
    """By what they are in the benchmark; and the same by another name, so it is no mere copy."""
    (cell,) = finished.cells
    merging = cell.merging("mta")
    assert merging
    wanted = read_recipes(merging.merged.recipes)
    file = written(tmp_path / "users.json", ROLES["few_shot"])
    users = histories(cell, file)
    personaliser = Personaliser(cell)
    made = personaliser([new_users.as_user(one) for one in users])
    assert {one.user_id: one.recipe for one in made} == wanted
    for one in made:
        export(Finished(finished), one.user_id, tmp_path / one.user_id)
        whole = read_peft(tmp_path / one.user_id)
        parts = new_users.whole_lora(cell, one.loras)
        differences = [(delta(whole, n) - delta(parts, n)).abs().max() for n in whole.layers]
        assert max(differences) < 1e-4
    renamed = [{**new_users.as_user(one), "user_id": f"other {one.user_id}"} for one in users]
    for before, now in zip(made, personaliser(renamed, train=False), strict=True):
        assert before.recipe
        assert now.recipe
        assert now.stacked is None
        assert now.recipe.anchors == before.recipe.anchors
        assert now.recipe.weights == pytest.approx(before.recipe.weights, abs=1e-3)
        assert now.merged
        assert before.merged
        assert largest_difference(now.merged, before.merged) < 1e-3


def test_one_user_is_as_one_of_several(plain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone is trained with the merged LoRA in the model's weights, which come back."""
    personaliser, users = Personaliser(plain.cells[0]), [dict(one) for one in NEW]
    for one in users:
        one["profile"] = [
            {"id": item["id"], "text": item["description"], "answer": item["tag"]}
            for item in one["profile"]
        ]
    weights = personaliser.model.base.model.state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    together = personaliser(users)
    folds = pipeline.noted(monkeypatch, "tasks.personalise.personaliser.folded", lambda *_: 1)
    for number, one in enumerate(users):
        (alone,) = personaliser([one])
        for lora in ("merged", "stacked"):
            pair = getattr(alone, lora), getattr(together[number], lora)
            assert largest_difference(*pair) < 1e-5
    assert len(folds) == 3
    with (
        pytest.raises(KeyboardInterrupt),
        folded(personaliser.model.base.model, together[0].loras[0]),
    ):
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_a_longer_history_is_another_user(plain: Run, tmp_path: Path) -> None:
    file = written(tmp_path / "users.json", pipeline.ONE_MORE_ITEM["few_shot"][:1])
    (cell,) = plain.cells
    users = histories(cell, file)
    assert len(users[0].profile) == 5
    (one,) = Personaliser(cell)([new_users.as_user(users[0])])
    merging = cell.merging("mta")
    assert merging
    assert one.recipe != read_recipes(merging.merged.recipes)["few-0"]


GOOD = json.dumps(NEW[0])
NO_TAG = '{"user_id": "u", "profile": [{"description": "x"}]}'
FOREIGN = '{"user_id": "u", "profile": [{"description": "x", "tag": "bad"}]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"[{GOOD}, {NO_TAG}]", "record 1 (user_id 'u'), profile item 0 has no 'tag' (its fields:"),
        (f"{NO_TAG}\n{GOOD}", "line 1 (user_id 'u'), profile item 0 has no 'tag' (its fields: "),
        (f"{GOOD}\n{FOREIGN}", "user u: none of 1 items can be used; each needs description and"),
        (f"{GOOD}\n{GOOD}", "line 2 (user_id 'new-0') has the user_id of line 1; ids must differ"),
        (f'{GOOD}\n{{"user_id": "u"}}', "line 2 (user_id 'u') has no profile; every user needs"),
        (f'{{"user_id": "u", "profile": [\n{GOOD}', "line 1: not valid JSON at line 2, column "),
        (f'{{"user_id": NaN}}\n{GOOD}\n', "line 1: cannot be read (NaN is not JSON); repair it"),
        (f"[{GOOD}, {GOOD[:-9]}", "record 1: not valid JSON at line 1, column "),
        (f'{GOOD}\n{{"user_id": "\udcff"}}', "line 2: not UTF-8 at byte "),
        (f"{GOOD}\n7", "line 2 is a number; it must be a JSON object"),
        ("[]", "holds an empty list; expected at least one user"),
        ("", "is empty; get it again"),
    ],
)  # fmt: skip
def test_a_bad_user_is_one_line_and_others_are_made(
    plain: Run, tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "users.json"
    file.write_text(text, errors="surrogateescape")
    to = tmp_path / "to"
    assert main(["personalise", "--run", "plain", "--user", str(file), "--to", str(to)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"mta: {file}: {words}")
    assert said.err.count("\n") == 1
    assert [line.split(":")[0] for line in said.out.splitlines()] == (
        [str(to / "new-0")] if GOOD in text else []
    )
    assert [path.name for path in to.glob("*")] == (["new-0"] if GOOD in text else [])


def test_the_command(plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object alone; what is there already stays; recipes alone need no training."""
    file, to = tmp_path / "user.json", tmp_path / "to"
    file.write_text(json.dumps(NEW[1]))
    given = ["personalise", "--run", "plain", "--user", str(file), "--to", str(to)]
    assert main(given) == 0
    assert f"{to / 'new-1'}: new-1, by 4 items, merged from 2 anch" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (to / "new-1").iterdir()}
    assert main(given) == 2
    assert f"mta: {to / 'new-1'}: is there already, so new-1 is left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (to / "new-1").iterdir()} == before
    assert main([*given, "--keep", "recipe", "--task", "LaMP-2M"]) == 0
    recipe = json.loads((to / "new-1.json").read_text())
    assert recipe["user"] == "new-1"
    assert recipe["merge"] == "exact"
    assert len(recipe["anchors"]) == 2
    assert sum(recipe["weights"]) == pytest.approx(1.0)
    capsys.readouterr()
    for more, words in (
        (["--task", "LaMP-3"], "--lamp-task LaMP-3: not in this run; it has LaMP-2M"),
        (["--method", "oppu"], "--method oppu: not in this run; it has merge_only, mta"),
        (["--run", "absent"], "--run absent: neither a run nor a file of one"),
        (["--to", str(file)], f"--to {file}: cannot be made (File exists); name another"),
        (["--user", str(tmp_path / "no.json")], "no.json: cannot be read (No such file or"),
    ):
        assert main([*given, *more]) == 2
        assert words in (said := capsys.readouterr().err)
        assert said.count("\n") == 1


def test_a_method_that_merges_nothing(first: Cell) -> None:
    with pytest.raises(InputError, match=r"--method stack_only: merges no LoRA by a recipe"):
        Personaliser(first, "stack_only")


def test_strange_ids_are_names_of_their_own(plain: Run, tmp_path: Path) -> None:
    names = ["../up", "a/b", "a b", "..", "x" * 300, "\u0430nne", "anne"]
    users = [{**NEW[0], "user_id": name} for name in names]
    lines, bad = told(plain, written(tmp_path / "users.json", users), tmp_path / "in" / "to")
    assert (len(lines), bad) == (len(names), [])
    folders = [path for path in (tmp_path / "in" / "to").iterdir() if path.is_dir()]
    found = {json.loads((path / "mta.json").read_text())["user"] for path in folders}
    assert found == set(names)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["to"]


def test_nothing_is_half_written(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cut off in the middle is no user's folder, and is made whole the next time."""
    file, to = written(tmp_path / "users.json", NEW[:1]), tmp_path / "to"

    def cut_off(folder: Path, *_: Any) -> None:
        (folder / "adapter_config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.lora.adapters.write_peft", cut_off)
        with pytest.raises(KeyboardInterrupt):
            list(personalise(Finished(plain), file, to))
    assert not (to / "new-0").exists()
    assert told(plain, file, to)[1] == []
    assert [path.name for path in to.iterdir()] == ["new-0"]
    assert read_peft(to / "new-0").rank == 8


def test_one_who_cannot_be_made_leaves_the_others(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one whom a stage refuses nor one whose loss is no number."""
    real: Callable[..., list[Personal]] = Personaliser.__call__

    def call(self: Personaliser, users: Any, train: bool = True) -> list[Personal]:
        if any(one["user_id"] == "new-1" for one in users):
            raise InputError("refused")
        made = real(self, users, train)
        return [Personal(one.user_id, failed=one.user_id == "new-2") for one in made]

    monkeypatch.setattr(Personaliser, "__call__", call)
    lines, bad = told(plain, written(tmp_path / "users.json", NEW), tmp_path / "to")
    assert len(lines) == 1
    assert bad[0] == "user new-1: refused"
    assert bad[1].startswith("user new-2: the loss of the stacked LoRA stopped being finite")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["new-0"]


def test_nothing_is_put_into_the_store(plain: Run, tmp_path: Path) -> None:
    before = sorted(store().root.rglob("*"))
    told(plain, written(tmp_path / "users.json", NEW), tmp_path / "to")
    assert sorted(store().root.rglob("*")) == before


def test_asking_as_the_run_asked(place: Path, finished: Run, tmp_path: Path) -> None:
    """The answers of the run to the users' own queries; of a new user, those of the folder."""
    (cell,) = finished.cells
    table = {one["user_id"]: one for one in users_of(cell.users.few_shot)}
    methods = {"base": "base", "merged": "merge_only", "stacked": "mta"}
    for query in table["few-1"]["query"]:
        found = ask(Finished(finished), "few-1", query["input"])
        wanted = {way: predictions(cell, name)[query["id"]] for way, name in methods.items()}
        assert found == wanted
    file = written(tmp_path / "new.json", NEW[:1])
    answers = ask(Finished(finished), str(file), "Which tag? description: a film")
    of_few = ask(Finished(finished), "few-1", "Which tag? description: a film")
    # Else another history stands before the question.
    assert answers["base"] == of_few["base"] or cell.config.prompt.history_items
    told(finished, file, tmp_path / "to")
    if not cell.config.prompt.history_items:
        prompts = ["description: a film tag:"]
        wanted = {"base": None, "stacked": tmp_path / "to" / "new-0"}
        for way, folder in wanted.items():
            assert [answers[way]] == stock_answers(place, folder, prompts)


def test_the_command_ask(plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["ask", "--run", "plain", "a film", "--user"]
    capsys.readouterr()
    assert main([*given, "few-0", "--compare"]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["base", "merged", "stacked"]
    assert main([*given, "few-0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == rows[2].removeprefix("stacked").strip()
    nobody = written(tmp_path / "nobody.json", [{"user_id": "u", "profile": []}])
    assert main([*given, str(nobody), "--compare"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == rows[0]
    two = written(tmp_path / "two.json", NEW[:2])
    for user_id, words in (
        ("stranger", "--user stranger: no few-shot user of the run plain of"),
        (str(two), f"--user {two}: holds 2 users (new-0, new-1); give a file of one"),
        (str(tmp_path / "no.json"), "no.json: cannot be read"),
    ):
        assert main([*given, user_id]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert main(["ask", "--run", "plain", " ", "--user", "few-0"]) == 2
    assert "the text is empty" in capsys.readouterr().err


def test_papers_without_citations_are_asked_as_in_the_run(place: Path, tmp_path: Path) -> None:
    """LaMP-1 of LaMP's own files: a few-shot user given again has the questions of the run."""
    data = write_official(tmp_path / "data", "LaMP-1")
    options = {"data": str(data), "lamp_tasks": ["LaMP-1"], "split": {"few_shot_items": 5}}
    config = resolve(options).for_task("LaMP-1", 0)
    prepared = prepared_users(config)
    cell: Any = SimpleNamespace(config=config, users=prepared)
    questions = json.loads((data / "dev_questions.json").read_text())
    given = [{"user_id": one["id"], "profile": one["profile"]} for one in questions]
    wanted = {one["user_id"]: one["profile"] for one in users_of(prepared.few_shot)}
    file = written(tmp_path / "users.json", [one for one in given if one["user_id"] in wanted])
    users = histories(cell, file)
    assert {one.user_id: one.profile for one in users} == wanted
