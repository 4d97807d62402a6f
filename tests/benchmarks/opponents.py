"""The engine's opponents that take one user after another, as people do today.

(a) `train_peft`: stock PEFT, one loaded base; with the merged LoRA as a second, frozen adapter
below, or without. Training alone.
(b) `train_published`: the structure of the published code: the merged LoRA is merged into the
base, that model is written to disk, read back, a new LoRA trained on it by transformers' Trainer,
written, model and LoRA are read back once more, and the user's questions answered.

Both train on the same token ids, batches of the same sizes and as many steps as the engine. A
third one takes all users at once (`plain_bmm`).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

from tasks.lora.batches import Encoded
from tasks.lora.train import Training, epochs
from tests.benchmarks.machine import wait


@dataclass(frozen=True)
class Job:
    """What opponents train: LoRAs of `rank` and `alpha` over the adapter in `merged`.

    `base` is the base model's folder, `tokenizer` its own.
    """

    base: Path
    merged: Path
    tokenizer: Any
    options: Training
    rank: int
    alpha: int
    dtype: torch.dtype
    device: torch.device

    @property
    def lora_config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="all-linear",
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def warmup(self, samples: int) -> int:
        """Warm-up steps of a user with so many samples."""
        return math.ceil(
            self.options.warmup_share * sum(1 for _ in epochs(samples, self.options, 0))
        )


def padded(samples: Sequence[Encoded], pad: int, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch as Hugging Face's collators make it: ids, mask, labels with -100 [B, T]."""
    width = max(len(s.prompt) + len(s.answer) for s in samples)

    def filled(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return gap + values if left else values + gap

    table = {
        "input_ids": [filled(s.prompt + s.answer, pad) for s in samples],
        "attention_mask": [filled([1] * (len(s.prompt) + len(s.answer)), 0) for s in samples],
        "labels": [filled([-100] * len(s.prompt) + s.answer, -100) for s in samples],
    }
    return {name: torch.tensor(rows) for name, rows in table.items()}


def train_peft(model: Any, users: Sequence[Sequence[Encoded]], job: Job, over_merged: bool) -> None:
    """(a): for each user a new LoRA on the one loaded base, trained by a plain loop."""
    options, pad = job.options, job.tokenizer.pad_token_id
    for number, samples in enumerate(users):
        wrapped = get_peft_model(model, job.lora_config, adapter_name="stacked")
        if over_merged:
            wrapped.load_adapter(job.merged, "merged")
            wrapped.base_model.set_adapter(["merged", "stacked"])
        wrapped.train()
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(".stacked." in name)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        steps = list(epochs(len(samples), options, number))
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        schedule = get_scheduler(
            options.schedule, optimizer, job.warmup(len(samples)), num_training_steps=len(steps)
        )
        for step in steps:
            for micro in step:
                batch = padded([samples[i] for i in micro], pad)
                batch = {name: value.to(job.device) for name, value in batch.items()}
                (wrapped(**batch, use_cache=False).loss / len(step)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        wrapped.unload()


def train_published(
    users: Sequence[Sequence[Encoded]],
    questions: Sequence[Sequence[Encoded]],
    job: Job,
    new_tokens: int,
) -> float:
    """(b), for each user. Returns the seconds that went into answering, of all of it."""
    answering = 0.0
    for number, (samples, asked) in enumerate(zip(users, questions, strict=True)):
        with tempfile.TemporaryDirectory() as scratch:
            whole, lora = Path(scratch) / "merged", Path(scratch) / "lora"
            base = _load(job.base, job)
            PeftModel.from_pretrained(base, job.merged).merge_and_unload().save_pretrained(whole)
            del base
            model = get_peft_model(_load(whole, job), job.lora_config)
            trainer = Trainer(
                model=model,
                args=_arguments(job, len(samples), number, Path(scratch) / "out"),
                train_dataset=list(samples),
                data_collator=lambda batch: padded(batch, job.tokenizer.pad_token_id),
            )
            trainer.train()
            model.save_pretrained(lora)
            del model, trainer
            personal = PeftModel.from_pretrained(_load(whole, job), lora).eval()
            wait(job.device)
            started = time.perf_counter()
            _answer(personal, asked, job, new_tokens)
            wait(job.device)
            answering += time.perf_counter() - started
    return answering


def _load(folder: Path, job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=job.dtype).to(job.device)


def _arguments(job: Job, samples: int, seed: int, out: Path) -> TrainingArguments:
    options = job.options
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=job.warmup(samples),
        max_grad_norm=options.max_grad_norm,
        weight_decay=options.weight_decay,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=job.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


@torch.no_grad()
def _answer(model: Any, questions: Sequence[Encoded], job: Job, new_tokens: int) -> list[str]:
    """Greedy answers of up to `new_tokens` to one user's questions, in one batch."""
    batch = padded(questions, job.tokenizer.pad_token_id, left=True)
    asked = {name: batch[name].to(job.device) for name in ("input_ids", "attention_mask")}
    made = model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)
    texts = job.tokenizer.batch_decode(
        made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]
