"""transformers' tests of models, on small models of several families.

The source distribution has the tests that all families share, without the families' own files. So
the small models are ours.
"""

import os
import unittest
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers_tests import test_modeling_common
from transformers_tests.test_modeling_common import ModelTesterMixin

from fedsplit.model import model_class_for
from simulations.tiny import tiny_config
from tests.peers.splitting import connected_copy, split_class

FAMILIES = os.environ["PEERS_FAMILIES"].split(",")
IS_SPLIT = os.environ["PEERS_MODELS"] == "split"
# The suite compares copies of a model under two implementations of attention.
test_modeling_common.deepcopy = connected_copy


class ModelTester:
    """Gives the suite a family's config and inputs; its attributes are those the suite reads."""

    is_training = True
    batch_size = 2
    seq_length = 7
    num_hidden_layers = 4

    def __init__(self, family: str) -> None:
        self._family = family
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size

    def get_config(self) -> PretrainedConfig:
        """The config of a small model."""
        return tiny_config(self._family, num_hidden_layers=self.num_hidden_layers)

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, Any]]:
        """A config and a batch."""
        ids_BT = torch.randint(3, self.vocab_size - 1, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    def prepare_config_and_inputs_for_model_class(
        self, model_class: type[Any]
    ) -> tuple[PretrainedConfig, dict[str, Any]]:
        """A config and a batch for a class of models."""
        return self.prepare_config_and_inputs_for_common()


def suite_of(family: str) -> type[unittest.TestCase]:
    """The suite for a family."""
    whole = model_class_for(tiny_config(family, num_hidden_layers=4))

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(family)

    body = {"all_model_classes": (split_class(whole) if IS_SPLIT else whole,), "setUp": set_up}
    return type(f"Test_{family}", (ModelTesterMixin, unittest.TestCase), body)


globals().update({f"Test_{family}": suite_of(family) for family in FAMILIES})
