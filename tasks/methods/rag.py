"""Retrieval: the items of the user's history that are most similar to the query, in the prompt.

BM25 picks them, as in the LaMP paper (Salemi et al. 2023, section 4).
"""

from tasks.methods.method import Method

METHOD = Method("rag", order=10, history=True)
