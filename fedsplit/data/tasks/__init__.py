"""The tasks: one object each, by the name that `RunSpec.task` has for it."""

from collections.abc import Mapping
from types import MappingProxyType

from fedsplit.data.tasks.base import COUNTS, Task
from fedsplit.data.tasks.causal_lm import CausalLM
from fedsplit.data.tasks.image_classification import ImageClassification
from fedsplit.data.tasks.sequence_classification import SequenceClassification

_ALL: tuple[Task, ...] = (
    CausalLM(),
    SequenceClassification(),
    ImageClassification(),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})

__all__ = ["COUNTS", "TASKS", "Task"]
