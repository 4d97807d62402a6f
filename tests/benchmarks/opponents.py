"""The engine's opponents: how people train and use one LoRA per user today.

`peft`: stock PEFT, one loaded base, one user after another; with the merged LoRA as a second,
frozen adapter below (`under`), or without.
`published`: the structure of the published recipe: the merged LoRA is merged into the base, that
model is written to disk, read back, a new LoRA trained on it by transformers' Trainer, written, and
model and LoRA are read back once more. Answering is not part of what is timed.

Both train on the same token ids, batches of the same sizes and as many steps as the engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

from tasks.lora.batches import Encoded
from tasks.lora.train import Recipe, epochs


def lora_config(rank: int, alpha: float) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha),
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def right_padded(samples: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """A batch as Hugging Face's collators make it: ids, mask, labels with -100."""
    width = max(len(s.prompt) + len(s.answer) for s in samples)
    ids, mask, labels = [], [], []
    for sample in samples:
        row = sample.prompt + sample.answer
        fill = width - len(row)
        ids.append(row + [pad] * fill)
        mask.append([1] * len(row) + [0] * fill)
        labels.append([-100] * len(sample.prompt) + sample.answer + [-100] * fill)
    table = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(rows) for name, rows in table.items()}


def train_peft(
    model: Any,
    users: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    rank: int,
    alpha: float,
    pad: int,
    under: Path | None = None,
) -> None:
    """(a): for each user a new LoRA on the one loaded base, trained by a plain loop."""
    device = next(model.parameters()).device
    for number, samples in enumerate(users):
        wrapped = get_peft_model(model, lora_config(rank, alpha), adapter_name="stacked")
        if under is not None:
            wrapped.load_adapter(under, "merged")
            wrapped.base_model.set_adapter(["merged", "stacked"])
        wrapped.train()
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(".stacked." in name)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        steps = list(epochs(len(samples), recipe, number))
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = get_scheduler(
            recipe.schedule,
            optimizer,
            num_warmup_steps=int(-(-recipe.warmup_share * len(steps) // 1)),
            num_training_steps=len(steps),
        )
        for step in steps:
            for micro in step:
                batch = right_padded([samples[i] for i in micro], pad)
                batch = {name: value.to(device) for name, value in batch.items()}
                (wrapped(**batch, use_cache=False).loss / len(step)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        wrapped.unload()


def train_published(
    folder: Path,
    users: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    rank: int,
    alpha: float,
    pad: int,
    merged: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """(b): merge into the base, write, read, new LoRA, Trainer, write, read back, per user."""
    for number, samples in enumerate(users):
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "merged"
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
            PeftModel.from_pretrained(base, merged).merge_and_unload().save_pretrained(whole)
            del base
            model = AutoModelForCausalLM.from_pretrained(whole, dtype=dtype).to(device)
            model = get_peft_model(model, lora_config(rank, alpha))
            arguments = TrainingArguments(
                output_dir=str(Path(scratch) / "out"),
                per_device_train_batch_size=recipe.batch_size,
                gradient_accumulation_steps=recipe.accumulation,
                num_train_epochs=recipe.epochs,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type=recipe.schedule,
                warmup_steps=int(-(-recipe.warmup_share * _steps(len(samples), recipe) // 1)),
                max_grad_norm=recipe.max_grad_norm,
                weight_decay=recipe.weight_decay,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=number,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=list(samples),
                data_collator=lambda batch: right_padded(batch, pad),
            )
            trainer.train()
            model.save_pretrained(Path(scratch) / "lora")
            del model, trainer
            again = AutoModelForCausalLM.from_pretrained(whole, dtype=dtype).to(device)
            PeftModel.from_pretrained(again, Path(scratch) / "lora").eval()


def _steps(count: int, recipe: Recipe) -> int:
    return sum(1 for _ in epochs(count, recipe, 0))
