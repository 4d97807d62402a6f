"""The code of MLflow's model `mta-bank` (tasks/tracking/registry.py), which MLflow runs.

    bank = mlflow.pyfunc.load_model("models:/mta-bank/3")
    bank.predict([{"user_id": "u1", "profile": [{"id": "1", "tag": "comedy", ...}]}])
    bank.predict(users, params={"keep": "folder"})

A recipe for each user, or a PEFT folder in `to`, as `mta personalise` makes them; who cannot be
made has an `error` instead. `load_model(..., model_config={"base": "/models/x", "to": "models"})`
says where the base model lies on this machine, and where folders are written: who asks a served
bank does not choose that.
"""

from pathlib import Path
from threading import Lock
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class BankModel(PythonModel):
    """The bank of a run, loaded once."""

    def load_context(self, context: Any) -> None:
        """Load base model and bank from the artifacts."""
        # Here: to register a bank runs this file, and loads no model.
        from tasks.personalise.registered import RegisteredBank

        config = context.model_config or {}
        self.bank = RegisteredBank(Path(context.artifacts["bank"]), config.get("base"))
        self.to, self.lock = Path(config.get("to", "personalised")), Lock()

    # Untyped: MLflow would take its types for a signature of its own.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A recipe, a folder or an error for each user; model_input: users, or a frame of them."""
        users = model_input if isinstance(model_input, list) else model_input.to_dict("records")
        keep = (params or {}).get("keep", "recipe")
        with self.lock:  # one batch of users at a time is in the model's layers
            return self.bank(users, keep, self.to)


set_model(BankModel())
