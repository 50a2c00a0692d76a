"""The frozen dataclasses that describe a run: the one place with defaults and range checks.

`conf/` names alternatives and `fedsplit.config` composes them, but every default and every
allowed value is defined here. A planned value that does not work yet has an error of its own.
"""

from fedsplit.spec.data import DataSpec, ShardingSpec
from fedsplit.spec.federation import ClientWeightsSpec, PolicySpec, StrategySpec
from fedsplit.spec.generation import GenerationSpec
from fedsplit.spec.guard import GuardSpec
from fedsplit.spec.limits import LimitsSpec
from fedsplit.spec.model import LoraSpec, ModelSpec, SplitSpec
from fedsplit.spec.privacy import PrivacySpec
from fedsplit.spec.run import NAME_PATTERN, LaunchSpec, RunSpec, SweepSpec
from fedsplit.spec.train import TrainSpec
from fedsplit.spec.wire import WireSpec

__all__ = [
    "NAME_PATTERN",
    "DataSpec",
    "GenerationSpec",
    "GuardSpec",
    "ClientWeightsSpec",
    "LaunchSpec",
    "LimitsSpec",
    "LoraSpec",
    "ModelSpec",
    "PolicySpec",
    "PrivacySpec",
    "RunSpec",
    "ShardingSpec",
    "SplitSpec",
    "StrategySpec",
    "SweepSpec",
    "TrainSpec",
    "WireSpec",
]
