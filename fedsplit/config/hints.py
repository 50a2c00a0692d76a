"""Hints for a field that a run does not have: names of other libraries, and near names here."""

import difflib
from collections.abc import Sequence

_ELSEWHERE = {
    # transformers' TrainingArguments
    "learning_rate": "train.lr",
    "num_train_epochs": "train.rounds and train.local_epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_gpu_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "max_grad_norm": "train.clip_norm",
    "optim": "train.optimizer",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "adam_epsilon": "train.eps",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_steps",
    "label_smoothing_factor": "train.label_smoothing",
    "gradient_checkpointing": "train.checkpointing",
    "torch_compile": "train.compile_client and train.compile_trunk",
    "eval_steps": "train.evaluate_every",
    "eval_strategy": "train.evaluate_every",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "load_best_model_at_end": "train.load_best",
    "early_stopping_patience": "train.patience",
    "resume_from_checkpoint": "resume",
    "output_dir": "launch.run_dir",
    "run_name": "name",
    "bf16": "model.autocast",
    "fp16": "model.autocast",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "model_name_or_path": "model.pretrained",
    "pretrained_model_name_or_path": "model.pretrained",
    "model_type": "model.family",
    "dataset_name": "data.path",
    "block_size": "data.sequence_length",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "vocab_size": "data.vocabulary",
    "device": "launch.trunk_device and launch.client_device",
    # peft's LoraConfig
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    # Flower's strategies, federations and example apps
    "num_rounds": "train.rounds",
    "num_server_rounds": "train.rounds",
    "local_steps_per_round": "train.local_steps",
    "epochs": "train.rounds and train.local_epochs",
    "num_clients": "clients",
    "num_supernodes": "clients",
    "num_partitions": "clients",
    "min_available_clients": "clients",
    "min_available_nodes": "clients",
    "min_fit_clients": "policy.quorum",
    "min_train_nodes": "policy.quorum",
    "fraction_fit": "policy.quorum",
    "fraction_train": "policy.quorum",
    "fraction_evaluate": "train.evaluate_every",
    "round_timeout": "policy.round_deadline_s",
    "server_address": "wire.bind",
}
"""Fields by the last part of their names in other libraries, with `_` for `-`."""

_LISTED = "python -m simulations.run --help lists all fields"


def hint(key: str, names: Sequence[str], groups: Sequence[str]) -> str:
    """Return what the user may have meant.

    >>> hint("train.learning_rate", ["train.lr", "clients"], ["train"])
    'did you mean train.lr?'
    >>> hint("trian.lr", ["train.lr", "clients"], ["train"])
    'did you mean train.lr?'

    Args:
        key: A field that does not exist.
        names: The fields of a run, by dotted name.
        groups: The groups of a run.
    """
    last = key.rpartition(".")[2].replace("-", "_")
    if elsewhere := _ELSEWHERE.get(last):
        return f"did you mean {elsewhere}?"
    # A right name in the wrong group is the likeliest mistake.
    same = [name for name in names if name.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, [*names, *groups])
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"a run's groups are {', '.join(groups)}; {_LISTED}"
