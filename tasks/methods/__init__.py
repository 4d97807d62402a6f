"""The methods that are compared, on the same users, prompts and seed: a file each.

A file of this package that defines `METHOD`, a `Method` (method.py), is a method. The flow, the
table, the report, MLflow, the dry run, export and forget take it from here.
"""

import importlib
import pkgutil
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from tasks.methods.method import Method


def _methods() -> dict[str, Method]:
    """The methods of this package's files, in the order of tables."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    methods = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {one.name: one for one in sorted(methods, key=lambda one: (one.order, one.name))}


METHODS: dict[str, Method] = _methods()


def _known(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"there is no method {name}; there are {', '.join(METHODS)}")
    return name


# The schema of the flow's parameters lists them, too.
MethodName = Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": list(METHODS)})]
