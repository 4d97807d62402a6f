"""What the engine is measured against: stock PEFT and transformers, one user at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from tasks.lora.adapters import Lora
from tasks.lora.batches import Encoded
from tasks.lora.train import Training

Steps = Sequence[Sequence[Sequence[int]]]


def attached(model: Any, **loras: Lora | None) -> Any:
    """A stock PEFT model around a copy of `model`, with all the LoRAs that are given active."""
    stock: Any = copy.deepcopy(model)
    given = {name: lora for name, lora in loras.items() if lora is not None}
    for number, (name, lora) in enumerate(given.items()):
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.scale * lora.rank,
            target_modules=sorted(lora.layers),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        if number == 0:
            stock = get_peft_model(stock, config, adapter_name=name)
        else:
            stock.add_adapter(name, config)
    if given:
        stock = stock.to(model.dtype)
        stock.base_model.set_adapter(list(given))
    for name, lora in given.items():
        fill(stock, name, lora)
    return stock.eval()


def places(stock: Any, name: str) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Layer -> the parameters A and B of the LoRA `name`."""
    return {
        layer.removeprefix("base_model.model."): (
            module.lora_A[name].weight,
            module.lora_B[name].weight,
        )
        for layer, module in stock.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


@torch.no_grad()
def fill(stock: Any, name: str, lora: Lora) -> None:
    found = places(stock, name)
    assert found.keys() == lora.layers.keys()
    for layer, pair in found.items():
        for parameter, tensor in zip(pair, lora.layers[layer], strict=True):
            assert parameter.shape == tensor.shape
            parameter.copy_(tensor)


def read(stock: Any, name: str, scale: float) -> Lora:
    layers = {
        n: (a.detach().clone(), b.detach().clone()) for n, (a, b) in places(stock, name).items()
    }
    return Lora(layers, scale)


def merged_by_hand(loras: Sequence[Lora], weights: Sequence[float], how: str) -> Lora:
    """docs/method.md, stage 2: sum of w_i B_i A_i side by side (`exact`), or of the factors."""
    layers = {}
    for name in loras[0].layers:
        a, b = ([lora.layers[name][side] for lora in loras] for side in (0, 1))
        heavy_b = [w * x for w, x in zip(weights, b, strict=True)]
        if how == "exact":
            layers[name] = (torch.cat(a, 0), torch.cat(heavy_b, 1))
        else:
            heavy_a = [w * x for w, x in zip(weights, a, strict=True)]
            layers[name] = (sum(heavy_a), sum(heavy_b))  # type: ignore[assignment]
    return Lora(layers, loras[0].scale)


def padded(samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Right-padded full rows with labels -100 off the answer, as transformers' examples do."""
    width = max(len(item.prompt) + len(item.answer) for item in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for item in samples:
        used = len(item.prompt) + len(item.answer)
        gap = width - used
        rows["input_ids"].append(item.prompt + item.answer + [0] * gap)
        rows["attention_mask"].append([1] * used + [0] * gap)
        rows["labels"].append([-100] * len(item.prompt) + item.answer + [-100] * gap)
    return {name: torch.tensor(value) for name, value in rows.items()}


def loss_of(model: Any, samples: Sequence[Encoded], tokens: int) -> Tensor:
    """Sum over answer tokens / `tokens`. transformers' own loss, which is float32 at most."""
    rows = padded(samples)
    if model.dtype != torch.float64:
        return model(**rows, num_items_in_batch=tokens).loss
    labels = rows.pop("labels")
    logits = model(**rows).logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / tokens


def train(
    model: Any,
    under: Lora | None,
    start: Lora,
    samples: Sequence[Encoded],
    steps: Steps,
    options: Training,
    stop: int | None = None,
) -> tuple[Lora, list[float]]:
    """The plain loop from `start` on the samples of each step: trained LoRA, loss per step.

    `stop`: only so many of the steps are done, of a schedule for all of them.
    """
    stock = attached(model, under=under, own=start)
    trained = list(chain(*places(stock, "own").values()))
    for parameter in stock.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = get_scheduler(
        "constant_with_warmup" if options.schedule == "constant" else options.schedule,
        optimizer,
        num_warmup_steps=math.ceil(options.warmup_share * len(steps)),
        num_training_steps=len(steps),
    )
    losses = []
    stock.train()
    for micro_batches in steps[:stop]:
        tokens = sum(len(samples[index].answer) for index in chain(*micro_batches))
        total = 0.0
        for batch in micro_batches:
            loss = loss_of(stock, [samples[index] for index in batch], tokens)
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return read(stock, "own", start.scale), losses


@torch.no_grad()
def likelihood(model: Any, item: Encoded) -> float:
    """log p(answer | prompt) of one sample."""
    return -loss_of(model, [item], 1).item()


@torch.no_grad()
def answer_ids(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation of one prompt, without special tokens at its end."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


def by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """The argmax continuation without a cache, up to and without the end-of-text token (2)."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if best == 2:
                break
            ids.append(best)
    return ids[len(prompt) :]


def largest_difference(left: Lora, right: Lora) -> float:
    assert left.layers.keys() == right.layers.keys()
    return max(
        float((a - b).abs().max())
        for name, pair in left.layers.items()
        for a, b in zip(pair, right.layers[name], strict=True)
    )
