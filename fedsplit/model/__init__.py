"""Parts of a split Hugging Face model, which train and generate exactly like the unsplit model."""

from fedsplit.model.build import (
    SplitModel,
    build_client,
    build_trunk,
    initial_parts,
    split_model,
)
from fedsplit.model.join import join_model
from fedsplit.model.plan import Plan, model_class_for, plan_for
from fedsplit.model.stage import ClientPart, TrunkPart, connect

__all__ = [
    "ClientPart",
    "Plan",
    "SplitModel",
    "TrunkPart",
    "build_client",
    "build_trunk",
    "connect",
    "initial_parts",
    "join_model",
    "model_class_for",
    "plan_for",
    "split_model",
]
