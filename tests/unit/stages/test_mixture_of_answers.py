"""Answers mixed in probability: against stock PEFT under each anchor, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lora.adapters import read_peft
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.methods.mixture_of_answers import Mixing, mixture
from tasks.personalise.personaliser import Personaliser
from tasks.recipes import read_recipes
from tasks.report.table import costs
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tests.unit.lora.peft_reference import attached
from tests.unit.stages.pipeline import ROLES, predictions, run, stock_answers

METHOD = "mixture_of_answers"
# Even weights: no anchor says alone what is answered.
EVEN: dict[str, Any] = {"top_m": 3, "weights": "evidence", "evidence_temperature": 1e6}


def mixed(place: Path, **given: Any) -> Cell:
    return run(place, ROLES, **({"methods": [METHOD], "fusion": EVEN} | given))


def stock(place: Path, cell: Cell) -> tuple[Any, dict[str, list[tuple[float, Any]]]]:
    """The base, and each user's weights with stock PEFT models."""
    base = load_base(place / "model", max_tokens=64, device="cpu")
    (merging,) = cell.mergings
    models = {
        one.anchor: attached(base.model, own=read_peft(store().path(one.adapter)))
        for one in merging.merged.bank.members
    }
    recipes = read_recipes(merging.merged.recipes)
    return base, {
        name: [(w, models[k]) for k, w in zip(one.anchors, one.weights, strict=True)]
        for name, one in recipes.items()
    }


def next_log_p(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return found


def answer_p(model: Any, prompt: list[int], answer: list[int]) -> float:
    """p(answer | prompt), token by token."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return math.exp(sum(float(log_p[t, y]) for t, y in zip(steps, answer, strict=True)))


def prompts_of(name: str) -> dict[str, str]:
    return {f"{name}-q{n}": f"description: {name} film number {n + 4} tag:" for n in range(2)}


@pytest.mark.parametrize("how", ["likelihood", "constrained"])
def test_labels_by_the_sum_of_their_probabilities(place: Path, how: str) -> None:
    """p(label) = sum_k w_k p_k(label); constrained: token by token among the labels' prefixes."""
    cell = mixed(place, scoring={"answer": how})
    base, users = stock(place, cell)
    wanted = {}
    for name, anchors in users.items():
        for query, prompt in prompts_of(name).items():
            samples = [encode(base, prompt, label) for label in MOVIE_TAGS]
            answers = [one.answer for one in samples]

            def p(
                answer: list[int], ids: list[int] = samples[0].prompt, on: Any = anchors
            ) -> float:
                return sum(w * answer_p(model, ids, answer) for w, model in on)

            if how == "likelihood":
                best = max(range(len(answers)), key=lambda n: p(answers[n]))
            else:
                written: list[int] = []
                while written not in answers:
                    leads = {one[len(written)] for one in answers if one[: len(written)] == written}
                    # The mixture's next token: p(written + token) / p(written).
                    written.append(max(sorted(leads), key=lambda y: p([*written, y])))
                best = answers.index(written)
            wanted[query] = MOVIE_TAGS[best]
    assert predictions(cell, METHOD) == wanted


def test_texts_token_by_token(place: Path) -> None:
    """The next token of sum_k w_k p_k(written) p_k(token | written), by stock PEFT."""
    cell = mixed(place)
    base, users = stock(place, cell)
    most, wanted = cell.users.task.max_new_tokens, {}
    for name, anchors in users.items():
        for query, prompt in prompts_of(name).items():
            ids, written = encode(base, prompt, None).prompt, []
            weights = [math.log(w) for w, _ in anchors]
            while len(written) < most and written[-1:] != [base.end_of_answer]:
                each = [next_log_p(model, ids + written) for _, model in anchors]
                both = torch.stack([w + p for w, p in zip(weights, each, strict=True)])
                token = int(both.logsumexp(0).argmax())
                weights = [w + float(p[token]) for w, p in zip(weights, each, strict=True)]
                written.append(token)
            wanted[query] = base.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert predictions(cell, METHOD) == wanted
    merged = run(place, ROLES, methods=["merge_only"], fusion=EVEN)
    assert wanted != predictions(merged, "merge_only")


def test_all_weight_on_one_anchor_is_that_anchor(place: Path) -> None:
    """At a temperature near 0, and so of `merge_only`; both as stock PEFT with its folder."""
    fusion = EVEN | {"evidence_temperature": 1e-6}
    cell = mixed(place, methods=["merge_only", METHOD], fusion=fusion)
    assert predictions(cell, METHOD) == predictions(cell, "merge_only")
    (merging,) = cell.mergings
    adapters = {one.anchor: one.adapter for one in merging.merged.bank.members}
    for name, recipe in read_recipes(merging.merged.recipes).items():
        assert recipe.weights == (1.0, 0.0, 0.0)
        folder = store().path(adapters[recipe.anchors[0]])
        asked, most = prompts_of(name), cell.users.task.max_new_tokens
        wanted = stock_answers(place, folder, [*asked.values()], most)
        assert [predictions(cell, METHOD)[query] for query in asked] == wanted
    assert costs(cell, METHOD)["passes_per_answer"] == 1
    assert costs(mixed(place), METHOD)["passes_per_answer"] == 3


def test_tokens_in_the_mixture_by_hand() -> None:
    """Two anchors at .75 and .25; p of two tokens is .5 .2 and .1 .8: .75 * .1 + .25 * .08."""
    log_p = torch.tensor([[0.5, 0.2], [0.1, 0.8]]).log()
    got = mixture(log_p, torch.tensor([0.75, 0.25], dtype=torch.float64).log()).exp()
    first = 0.75 * 0.5 + 0.25 * 0.1
    assert got.tolist() == pytest.approx([first, (0.75 * 0.1 + 0.25 * 0.08) / first])


def test_next_tokens_in_the_mixture_by_hand() -> None:
    """The same numbers: token 0 first, then 1; a second question beside it stays apart."""
    mixing = Mixing(torch.tensor([0.75, 0.25], dtype=torch.float64).log(), 2)
    scores = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]).log()
    first = mixing(torch.zeros(4, 1, dtype=torch.long), scores).exp()
    assert torch.allclose(first, torch.tensor([[0.4, 0.6], [0.9, 0.1]] * 2))
    again = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.2, 0.8], [0.3, 0.7]]).log()
    second = mixing(torch.zeros(4, 2, dtype=torch.long), again).exp()
    likely = (0.75 * 0.5 * 0.2 + 0.25 * 0.1 * 0.8) / 0.4
    assert second[:, 1].tolist() == pytest.approx([likely, 0.7] * 2)


def test_there_is_nothing_to_export(place: Path, tmp_path: Path) -> None:
    cell = mixed(place, methods=["merge_only", METHOD])
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    with pytest.raises(InputError) as caught:
        export(Finished(made, "LaMP-2M", METHOD), "few-1", tmp_path / "lora")
    assert str(caught.value) == (
        f"--method {METHOD}: gives no user a LoRA, so there is none to write; it is there for "
        "merge_only"
    )
    with pytest.raises(InputError, match=f"--method {METHOD}: makes its LoRAs in a way that new"):
        Personaliser(cell, METHOD)
    assert not (tmp_path / "lora").exists()
