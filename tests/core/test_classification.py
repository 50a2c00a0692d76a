"""Classifiers are cut, trained and adapted exactly: the unsplit model is the judge."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fedsplit.data import (
    TASKS,
    Batch,
    Corpus,
    Document,
    evaluation_batches,
    hold_out,
    labels_of,
    load_corpus,
    train_tokenizer,
    training_batches,
)
from fedsplit.errors import CheckpointError, ConfigError
from fedsplit.model import build_client, build_trunk, join_model, model_class_for, split_model
from fedsplit.model.join import folded_state
from fedsplit.model.lora import add_adapters, save_adapter, trainable
from fedsplit.model.plan import classifier_fields, plan_for
from fedsplit.optimization import PartOptimizer
from fedsplit.spec import DataSpec, LoraSpec, RunSpec, SplitSpec, TrainSpec
from tests.core.worlds import same, small_run, world

# peft 0.21 asks transformers 5.23 for a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SPLIT = SplitSpec.parse("1/2/1")
TEXTS, IMAGES = "sequence_classification", "image_classification"
LABELS = ("ham", "other", "spam")
SMALL = {
    "bert": {"intermediate_size": 32},
    "roberta": {"intermediate_size": 32, "max_position_embeddings": 32},
    "electra": {"intermediate_size": 32, "embedding_size": 8},
    "modernbert": {"intermediate_size": 32},
    "llama": {"intermediate_size": 32},
    "qwen3": {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8},
}
SMALL_OTHERWISE = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16},
    "distilbert": {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32},
}
USUAL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
QUIET = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}
QUIET |= {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "intermediate_size": 32}
TEXT_FAMILIES = (*SMALL, *SMALL_OTHERWISE)
IMAGE_FAMILIES = ("vit", "deit", "dinov2")


def corpus_of_texts() -> Corpus:
    """Texts of one word up to many, so that some are padded and some are cut."""
    texts = ["a", "b a b", "to be or not to be, that is the question", "b", "a b c d e", "bb aa"]
    documents = (
        Document(text=text, group=str(i), label=LABELS[i % 3]) for i, text in enumerate(texts)
    )
    return Corpus(name="sample", documents=tuple(documents))


@pytest.fixture(scope="module")
def texts() -> Batch:
    corpus = corpus_of_texts()
    tokenizer = train_tokenizer(corpus, 270, begins_texts=True)
    return (
        TASKS[TEXTS]
        .examples(corpus, DataSpec(sequence_length=12), tokenizer, LABELS)
        .batch(range(6))
    )


@pytest.fixture(scope="module")
def images() -> Batch:
    pytest.importorskip("sklearn")
    corpus = load_corpus(DataSpec(kind="digits"), IMAGES)
    few = replace(corpus, documents=corpus.documents[:6])
    return (
        TASKS[IMAGES]
        .examples(few, DataSpec(kind="digits"), None, labels_of(corpus))
        .batch(range(6))
    )


def config_of(model_type: str) -> PretrainedConfig:
    sizes = SMALL_OTHERWISE.get(model_type) or {**USUAL, **SMALL.get(model_type, IMAGE)}
    if model_type in IMAGE_FAMILIES:
        return CONFIG_MAPPING[model_type](**sizes, **classifier_fields("0123456789"))
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return CONFIG_MAPPING[model_type](
        vocab_size=270, **sizes, **ids, **classifier_fields(LABELS, 0)
    )


def task_of(model_type: str) -> str:
    return IMAGES if model_type in IMAGE_FAMILIES else TEXTS


def whole_of(model_type: str, attention: str = "eager") -> PreTrainedModel:
    """A classifier without a trivial weight, in evaluation mode."""
    config = config_of(model_type)
    config.use_cache = False  # keys that went through a cache lie in memory in another order
    torch.manual_seed(0)
    whole = model_class_for(config, task_of(model_type))._from_config(
        config, attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return whole.eval()


@pytest.fixture
def batch_of(texts, images):
    return lambda model_type: images if model_type in IMAGE_FAMILIES else texts


def results(models, batch: Batch) -> dict[str, torch.Tensor]:
    """Logits, loss and all gradients; the first model is called."""
    out = models[0](**batch.inputs, labels=batch.labels)
    out.loss.backward()
    gradients = {n: p.grad for m in models for n, p in m.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


# --- the cut ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", [*TEXT_FAMILIES, *IMAGE_FAMILIES])
def test_logits_loss_and_every_gradient_are_equal(model_type, attention, batch_of):
    whole = whole_of(model_type, attention)
    parts = split_model(whole, SPLIT)
    assert parts.client.config._attn_implementation == attention
    batch = batch_of(model_type)
    wanted, found = results([whole], batch), results([parts.client, parts.trunk], batch)
    assert wanted["logits"].shape == (6, whole.config.num_labels)
    assert same(wanted, found)
    assert same(join_model(parts.client, parts.trunk).state_dict(), whole.state_dict())


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_padding_changes_no_prediction(model_type, texts):
    whole = whole_of(model_type)
    lengths = texts.inputs["attention_mask"].sum(1).tolist()
    assert min(lengths) == 2 and max(lengths) == 12
    with torch.no_grad():
        together = whole(**texts.inputs).logits
        alone = [
            whole(input_ids=ids_T[None, :length]).logits[0]
            for ids_T, length in zip(texts.inputs["input_ids"], lengths, strict=True)
        ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_decoder_classifies_by_the_last_token_of_the_text(texts):
    whole = whole_of("llama")
    last = texts.inputs["attention_mask"].sum(1) - 1
    hidden_BTD = whole.model(**texts.inputs).last_hidden_state
    wanted = whole.score(hidden_BTD)[torch.arange(6), last]
    assert torch.equal(whole(**texts.inputs).logits, wanted)


# --- a step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit"])
def test_a_step_is_the_unsplit_model_s(model_type, batch_of):
    config, batch = config_of(model_type), batch_of(model_type)
    config.update(dict.fromkeys(QUIET.get(model_type, ()), 0.0))
    kind = "digits" if model_type == "vit" else "embedded"
    data = DataSpec(kind=kind, sequence_length=12)
    run = small_run(split=SPLIT, task=task_of(model_type), data=data)
    run = replace(run, train=replace(run.train, batch_size=6))
    family = model_class_for(config, run.task)
    with world(config, run) as w:
        whole = join_model(w.parts.client, w.parts.trunk).train()
        whole.config.use_cache = False
        member = w.add("alice")
        with member.trunk.session():
            split_loss = member.trainer.step([batch]).loss
        joined = {**member.model.state_dict(), **w.trunk_weights()}
    assert type(whole) is family
    optimizer = PartOptimizer(dict(whole.named_parameters()), run.train)
    loss = whole(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    optimizer.step(0)
    assert split_loss == loss.item()
    assert all(torch.equal(joined[name], p) for name, p in whole.named_parameters())


def test_a_split_vision_transformer_learns_digits():
    pytest.importorskip("sklearn")
    data = DataSpec(kind="digits")
    training, held_out = hold_out(load_corpus(data, IMAGES), 0.1, seed=0)
    labels = labels_of(training)
    train = TrainSpec(batch_size=32, lr=2e-3, rounds=1, local_steps=60, warmup_steps=10)
    run = RunSpec(task=IMAGES, split=SPLIT, data=data, train=train)
    config = config_of("vit")
    config.hidden_size, config.intermediate_size = 32, 64
    rows = TASKS[IMAGES].examples(training, data, None, labels)
    batches = training_batches(rows, batch_size=32, num_batches=60, seed=0, start=0)
    with world(config, run) as w:
        member = w.add("alice")
        member.trainer.fit([batch] for batch in batches)
        unseen = evaluation_batches(TASKS[IMAGES].examples(held_out, data, None, labels), 32)
        found = member.trainer.evaluate(unseen)
    assert found.num_tokens == len(held_out.documents)
    assert found.counts["correct"] > 0.5 * found.num_tokens


# --- a checkpoint made for another task --------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A GPT-2 language model on disk; it has no head for classes."""
    config = CONFIG_MAPPING["gpt2"](vocab_size=270, **SMALL_OTHERWISE["gpt2"])
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def test_a_head_that_the_checkpoint_lacks_follows_the_seed(checkpoint, texts):
    config = config_of("gpt2")
    family = model_class_for(config, TEXTS)
    torch.manual_seed(7)
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint, config=config).eval()
    untouched = torch.get_rng_state()
    made = [
        split_model(checkpoint, SPLIT, config=config, model_class=family, seed=seed)
        for seed in (7, 8)
    ]
    assert torch.equal(torch.get_rng_state(), untouched)
    wanted = whole(**texts.inputs).logits
    assert torch.equal(made[0].client(**texts.inputs).logits, wanted)
    assert not torch.equal(made[0].client.score.weight, made[1].client.score.weight)
    assert made[0].client.config.id2label == dict(enumerate(LABELS))


def test_only_the_head_may_be_missing(checkpoint):
    config = config_of("gpt2")
    config.n_layer, split = 5, SplitSpec.parse("1/2/2")
    options = {"source": checkpoint, "model_class": model_class_for(config, TEXTS)}
    with pytest.raises(CheckpointError, match=r"tensor 'transformer.h.4.attn.c_attn.bias' of GPT2"):
        build_client(config, split, **options)
    build_trunk(config, split, **options)


def test_a_language_model_must_have_its_head(tiny_gpt2):
    config = tiny_gpt2(tie_word_embeddings=False)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    del state["lm_head.weight"]
    with pytest.raises(CheckpointError, match="tensor 'lm_head.weight' of GPT2LMHeadModel is miss"):
        build_client(config, SPLIT, state_dict=state)


# --- adapters --------------------------------------------------------------------------------

HEADS = {
    "bert": ("classifier",),
    "distilbert": ("classifier", "pre_classifier"),
    "roberta": ("classifier",),
    "gpt2": ("score",),
    "llama": ("score",),
    "vit": ("classifier",),
}


@pytest.mark.parametrize(("model_type", "head"), HEADS.items(), ids=HEADS)
def test_a_plan_names_the_head_of_a_classifier(model_type, head):
    config = config_of(model_type)
    assert sorted(plan_for(model_class_for(config, task_of(model_type)), config).head) == [*head]


def test_a_plan_of_a_language_model_names_no_head(tiny_gpt2):
    assert plan_for(model_class_for(tiny_gpt2()), tiny_gpt2()).head == ()


def adapted(whole: PreTrainedModel, **fields: object):
    """Both parts with adapters of arbitrary values."""
    parts = split_model(whole, SPLIT)
    generator = torch.Generator().manual_seed(2)
    for part in (parts.client, parts.trunk):
        add_adapters(part, LoraSpec(enabled=True, rank=4, **fields))
        with torch.no_grad():
            for parameter in trainable(part).values():
                parameter.normal_(0.0, 0.3, generator=generator)
    return parts


@pytest.mark.parametrize(
    ("model_type", "targets"), [*((name, "auto") for name in HEADS), ("bert", "query, classifier")]
)
def test_adapters_and_head_are_one_adapter_of_the_whole(model_type, targets, batch_of, tmp_path):
    whole, batch = whole_of(model_type), batch_of(model_type)
    parts = adapted(whole, targets=targets)
    head = HEADS[model_type]
    names = {name for part in (parts.client, parts.trunk) for name in trainable(part)}
    in_full = {name for name in names if "lora_" not in name}
    assert in_full == {n for n, _ in whole.named_parameters() if n.startswith(head)}
    save_adapter(parts.client, parts.trunk, tmp_path)
    judge = PeftModel.from_pretrained(whole, str(tmp_path), is_trainable=True).eval()
    wanted, found = results([judge], batch), results([parts.client, parts.trunk], batch)
    of_whole = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): tensor
        for name, tensor in wanted.items()
    }
    assert same(of_whole, found)
    merged = judge.merge_and_unload().state_dict()
    assert same(join_model(parts.client, parts.trunk).state_dict(), merged)


def test_the_head_trains_whatever_the_switches_say(tmp_path):
    parts = adapted(whole_of("bert"), bottom=False, top=False)
    assert set(trainable(parts.client)) == {"classifier.weight", "classifier.bias"}
    assert {name.split(".")[3] for name in trainable(parts.trunk)} == {"1", "2"}
    save_adapter(parts.client, parts.trunk, tmp_path)
    judge = PeftModel.from_pretrained(whole_of("bert"), str(tmp_path))
    saved = judge.base_model.model.classifier.modules_to_save["default"]
    assert same(saved.state_dict(), parts.client.classifier.state_dict())


def test_the_unsplit_model_takes_adapters_too():
    whole = whole_of("bert")
    add_adapters(whole, LoraSpec(enabled=True, rank=4))
    parts = adapted(whole_of("bert"))
    assert set(trainable(whole)) == {*trainable(parts.client), *trainable(parts.trunk)}
    assert folded_state(whole).keys() == whole_of("bert").state_dict().keys()


# --- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "found"), [((), "none"), (("spam",), "spam")])
def test_a_classifier_needs_two_classes(labels, found):
    with pytest.raises(ConfigError, match=f"at least 2 classes, but the data has: {found}; set da"):
        classifier_fields(labels)


def test_the_classes_are_in_the_config():
    config = config_of("bert")
    assert config.num_labels == 3
    assert (config.id2label[2], config.label2id["spam"]) == ("spam", 2)
    assert config.pad_token_id == 0
