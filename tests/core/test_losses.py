"""Label smoothing: Hugging Face's Trainer on the unsplit model is the judge."""

from dataclasses import replace

import pytest
import torch
from transformers import BertForSequenceClassification
from transformers.trainer_pt_utils import LabelSmoother

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import TASKS, Batch
from fedsplit.link import LocalLink
from fedsplit.model import connect, initial_parts, join_model
from fedsplit.model.lora import trainable
from fedsplit.optimization import PartOptimizer
from fedsplit.trunk.service import TrunkService
from simulations.tiny import tiny_config
from tests.core.worlds import batch, small_run

SMOOTHING = 0.1


def language(tiny_llama):
    return "causal_lm", tiny_llama(), {}, [batch(0), batch(1, pad=5)]


def classes(tiny_llama):
    config = tiny_config("bert", num_hidden_layers=4, num_labels=3)
    labels_B = torch.tensor([2, 0])
    rows = [
        Batch(inputs=batch(i).inputs, labels=labels_B, num_tokens=2, num_bytes=0) for i in (0, 1)
    ]
    options = {"model_class": BertForSequenceClassification}
    return "sequence_classification", config, options, rows


@pytest.mark.parametrize("task", [language, classes])
def test_training_is_that_of_the_hf_trainer_and_evaluation_is_not_smoothed(tiny_llama, task):
    name, config, options, (trained_on, held_out) = task(tiny_llama)
    base = small_run(task=name)
    run = replace(base, train=replace(base.train, label_smoothing=SMOOTHING))
    parts = initial_parts(config, run.split, run.seed, **options)
    whole = join_model(parts.client, parts.trunk)
    for model in (whole, parts.client, parts.trunk):
        without_dropout(model)
    with TrunkService(parts.trunk, run) as service:
        trunk = RemoteTrunk(
            LocalLink(service, service.admit("alice")), parts.client, run, client="alice"
        )
        connect(parts.client, trunk)
        trainer = ClientTrainer(parts.client, trunk, run)
        before = trainer.evaluate([held_out])
        stats = trainer.fit([[trained_on]])

    plain = whole(**held_out.inputs, labels=held_out.labels).loss.item()
    assert before.nats / before.num_tokens == pytest.approx(plain, rel=1e-6)
    output, is_language = whole(**trained_on.inputs), trained_on.labels.ndim == 2
    loss = LabelSmoother(SMOOTHING)(output, trained_on.labels, shift_labels=is_language)
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    PartOptimizer(trainable(whole), run.train).step(0)
    found = join_model(parts.client, parts.trunk).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_is_the_smoothers_loss(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels_BT = torch.randint(0, 7, (2, 5), generator=generator)
    labels_BT[0, 3:] = -100
    wanted = LabelSmoother(smoothing)({"logits": logits}, labels_BT, shift_labels=True)
    torch.testing.assert_close(TASKS["causal_lm"].loss(logits, labels_BT, smoothing), wanted)
