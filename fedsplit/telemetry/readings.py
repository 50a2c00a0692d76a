"""The values of metrics that are read when Prometheus asks: of trunks, rounds and GPUs."""

import math
import platform
from collections.abc import Iterator
from datetime import UTC
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from cryptography import x509

from fedsplit.telemetry.events import CacheState, RunBegan, StepTaken, TrunkState
from fedsplit.telemetry.round import RoundStats

Reading = tuple[str, tuple[str, ...], float]
"""The name of a metric without `fedsplit_`, the values of its labels, and its value."""


def of_build() -> Iterator[Reading]:
    """Yield the versions of this process."""
    try:
        own = version("fedsplit")
    except PackageNotFoundError:  # a checkout that is not installed
        own = "unknown"
    yield "build_info", (own, platform.python_version(), torch.__version__), 1.0


def of_trunk(name: str, state: TrunkState) -> Iterator[Reading]:
    """Yield the state of a trunk."""
    yield "trunk_running", (name,), float(state.is_running)
    yield "parameter_version", (name,), state.version
    yield "sessions", (name,), state.sessions
    yield "training_clients", (name,), state.clients
    yield "waiting_calls", (name,), state.waiting
    yield "step_idle_seconds", (name,), state.idle_s
    yield "step_interval_seconds", (name,), state.interval_s
    yield "clipped_gradients_total", (name,), state.clipped
    yield "refused_gradients_total", (name,), state.refused
    yield "quarantines_total", (name,), state.quarantines
    yield from _of_cache((name, "stash"), state.stash)
    yield from _of_cache((name, "kv"), state.kv_cache)


def _of_cache(labels: tuple[str, ...], cache: CacheState) -> Iterator[Reading]:
    yield "cache_bytes", labels, cache.num_bytes
    yield "cache_limit_bytes", labels, cache.limit_bytes
    yield "cache_lookups_total", (*labels, "hit"), cache.hits
    yield "cache_lookups_total", (*labels, "miss"), cache.misses
    yield "evictions_total", labels, cache.evictions


def of_step(step: StepTaken) -> Iterator[Reading]:
    """Yield the numbers of the last step."""
    yield "learning_rate", (), step.lr
    yield "gradient_norm", (), step.gradient_norm


def of_round(run: RunBegan, stats: RoundStats, eval_loss: float) -> Iterator[Reading]:
    """Yield the numbers of the last round that were measured.

    Args:
        run: The run.
        stats: The round.
        eval_loss: The last held-out loss that was measured; NaN if there is none.
    """
    yield "round", (), stats.round
    yield "rounds_planned", (), stats.rounds
    yield "round_duration_seconds", (), stats.seconds
    for outcome, count in (
        ("trained", stats.clients),
        ("late", stats.late),
        ("failed", stats.failed),
    ):
        yield "round_clients", (outcome,), count
    for name, loss in (("train_loss_nats", stats.loss), ("eval_loss_nats", eval_loss)):
        if not math.isnan(loss):
            yield name, (), loss
    yield "privacy_epsilon", ("row",), stats.row_epsilon
    yield "privacy_epsilon", ("sequence",), stats.sequence_epsilon
    yield "privacy_epsilon", ("weights",), stats.weights_epsilon
    # Labels that are sent as they are have no part in the budget.
    bits = stats.bits + (stats.label_bits if run.settings.get("privacy.gradient_z") else 0.0)
    yield "privacy_budget_spent_ratio", (), bits / run.budget_bits if run.budget_bits else 0.0


def of_certificate(file: str) -> Iterator[Reading]:
    """Yield the end of the first certificate of a PEM file; nothing if it cannot be read."""
    try:
        certificate = x509.load_pem_x509_certificate(Path(file).read_bytes())
    except (OSError, ValueError):  # the server says what is wrong when it reads the file
        return
    end = certificate.not_valid_after_utc.astimezone(UTC).timestamp()
    yield "certificate_expiry_timestamp_seconds", (), end


def of_gpus() -> Iterator[Reading]:
    """Yield memory and utilization of the GPUs that this process uses."""
    # Not before: to ask would occupy memory on every GPU.
    if not torch.cuda.is_initialized():
        return
    for number in range(torch.cuda.device_count()):
        if not torch.cuda.memory_reserved(number):
            continue
        labels = (f"cuda:{number}",)
        free, total = torch.cuda.mem_get_info(number)
        yield "gpu_memory_used_bytes", labels, total - free
        yield "gpu_memory_limit_bytes", labels, total
        try:
            yield "gpu_utilization_ratio", labels, torch.cuda.utilization(number) / 100
        except (ImportError, RuntimeError):  # without NVIDIA's library for it
            continue
