"""The engine that trains and answers many users at once; peft_engine.py has the same functions."""

from tasks.lora.answer import answer_log_p, answer_users, evidence
from tasks.lora.group_train import train_group
from tasks.lora.grouped import grouped, shapes_of

__all__ = ["answer_log_p", "answer_users", "evidence", "grouped", "shapes_of", "train_group"]
