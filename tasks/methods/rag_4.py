"""Retrieval with four items of the user's history in the prompt."""

from tasks.methods.method import Method

METHOD = Method(
    "rag_4", order=11, settings={"rag": {"history_items": 4}}, history=True, default=False
)
