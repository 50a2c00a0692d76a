"""The table of all metrics that Prometheus can read: name, kind, meaning, labels and buckets."""

from dataclasses import dataclass

_FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW_S = (*_FAST_S[4:], 30.0, 60.0, 120.0)
_COUNTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

REQUESTS = (
    "open",
    "forward",
    "backward",
    "step",
    "generate",
    "close",
    "gradients",
    "training_state",
    "service_info",
)
"""The kinds of requests."""

PASSES = ("forward", "backward", "step", "evaluate", "generate")
"""The kinds of passes of a trunk."""

OUTCOMES = ("used", "late", "stale", "refused")
"""What becomes of a contribution."""

OTHERS = "other"
"""The label of all clients that have none of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric.

    Attributes:
        name: Its name, as Prometheus reads it.
        kind: counter, gauge or histogram.
        text: Its meaning, and its unit.
        labels: The names of its labels.
        buckets: The upper bounds of a histogram.
        known: The values of its only label, or of the first one, that it has from the beginning, so
            that the first event is an increase.
        by_client: Whether it has a further label, `client`, where that was asked for.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[str, ...] = ()
    by_client: bool = False


def _counter(
    name: str, text: str, *labels: str, known: tuple[str, ...] = (), by_client: bool = False
) -> Metric:
    return Metric(
        name=f"fedsplit_{name}",
        kind="counter",
        text=text,
        labels=labels,
        known=known,
        by_client=by_client,
    )


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"fedsplit_{name}", kind="gauge", text=text, labels=labels)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    *labels: str,
    known: tuple[str, ...] = (),
    by_client: bool = False,
) -> Metric:
    return Metric(
        name=f"fedsplit_{name}",
        kind="histogram",
        text=text,
        labels=labels,
        buckets=buckets,
        known=known,
        by_client=by_client,
    )


EVENTS = (
    # --- the server of a trunk
    _counter("requests_total", "Requests, by their kind and their result.", "kind", "code"),
    _histogram(
        "request_duration_seconds",
        "Time from a request to its reply.",
        _SLOW_S,
        "kind",
        known=REQUESTS,
    ),
    _counter("received_bytes_total", "Bytes of frames from clients.", "kind", "codec"),
    _counter("sent_bytes_total", "Bytes of frames to clients.", "kind", "codec"),
    # --- the engine of a trunk
    _histogram(
        "queue_duration_seconds",
        "Time for which a call was ready to run, and waited for others.",
        _FAST_S,
        "kind",
        known=PASSES,
    ),
    _histogram(
        "compute_duration_seconds", "Time of a pass of the trunk.", _FAST_S, "kind", known=PASSES
    ),
    _histogram("pass_sessions", "Sessions in a pass.", _COUNTS[1:], "kind", known=PASSES),
    _counter("tokens_total", "Tokens that ran through the trunk's blocks.", "kind", known=PASSES),
    _counter(
        "contributions_total",
        "Clients' parts of steps: used, late (used, though older than the last step), stale "
        "(refused, because too old), refused (for their numbers).",
        "outcome",
        known=OUTCOMES,
        by_client=True,
    ),
    _histogram(
        "contribution_staleness_steps",
        "Steps that were taken between the begin of a contribution and its use.",
        _COUNTS,
        by_client=True,
    ),
    _histogram(
        "barrier_wait_seconds",
        "Time from a contribution to the step that uses it.",
        _SLOW_S,
        by_client=True,
    ),
    _counter("steps_total", "Optimizer steps of the trunk."),
    # --- a client
    _histogram(
        "client_step_duration_seconds",
        "Time of a training step of a client.",
        _SLOW_S,
        by_client=True,
    ),
    _counter("client_samples_total", "Sequences that clients trained on.", by_client=True),
    _counter("client_tokens_total", "Tokens that clients trained on.", by_client=True),
    _counter(
        "client_retries_total",
        "Attempts at requests that failed and were made again, by the code of the error.",
        "code",
        known=("CONN_LOST", "DEADLINE", "OVERLOADED"),
    ),
    _histogram(
        "client_time_to_first_token_seconds",
        "Time from a prompt to the trunk's output for the first token.",
        _SLOW_S,
    ),
    _histogram(
        "client_time_between_tokens_seconds",
        "Time from the trunk's output for a token to that for the next one.",
        _FAST_S,
    ),
)
"""The metrics that are counted as events happen."""

STATES = (
    _gauge("build_info", "1, with the versions of the process.", "version", "python", "torch"),
    # --- a trunk
    _gauge("trunk_running", "1 while a trunk serves, 0 after it failed.", "trunk"),
    _gauge("parameter_version", "The parameter version of a trunk.", "trunk"),
    _gauge("sessions", "Open sessions of a trunk.", "trunk"),
    _gauge("training_clients", "Clients in the middle of training with a trunk.", "trunk"),
    _gauge("waiting_calls", "Calls that wait for a barrier.", "trunk"),
    _gauge(
        "step_idle_seconds",
        "Time since the last step while clients train, or since they began; 0 if none trains.",
        "trunk",
    ),
    _gauge("step_interval_seconds", "Median of the last 32 times between two steps.", "trunk"),
    _counter("clipped_gradients_total", "Gradients that the guard clipped.", "trunk"),
    _counter("refused_gradients_total", "Gradients that the guard refused.", "trunk"),
    _counter("quarantines_total", "Times that the guard excluded a client.", "trunk"),
    _gauge(
        "cache_bytes",
        "Bytes of the stash of activations (stash), and of keys and values (kv).",
        "trunk",
        "cache",
    ),
    _gauge("cache_limit_bytes", "The most bytes of a cache.", "trunk", "cache"),
    _counter(
        "cache_lookups_total",
        "Backwards that looked for their graph, and requests for the tokens before: hit or miss.",
        "trunk",
        "cache",
        "result",
    ),
    _counter("evictions_total", "What a cache dropped to make room.", "trunk", "cache"),
    # --- the last step
    _gauge("learning_rate", "The learning rate of the last step."),
    _gauge(
        "gradient_norm",
        "Mean norm of the clients' gradients in the last step, before they were clipped.",
    ),
    # --- the last round of a run
    _gauge("round", "The last round that was finished."),
    _gauge("rounds_planned", "The rounds of the run."),
    _gauge("round_duration_seconds", "Time of the last round, without its evaluation."),
    _gauge("round_clients", "Clients of the last round: trained, late or failed.", "outcome"),
    _gauge("train_loss_nats", "Training loss of the last round, per token."),
    _gauge("eval_loss_nats", "Held-out loss of the last round that measured it, per token."),
    _gauge(
        "privacy_epsilon",
        "Epsilon spent: on one row and on a text (sequence), at delta 1e-5; on client weights.",
        "unit",
    ),
    _gauge(
        "privacy_budget_spent_ratio",
        "The part of privacy.budget_bits that was spent on the worst text; 0 without a bound.",
    ),
    # --- the machine
    _gauge("certificate_expiry_timestamp_seconds", "The end of the server's TLS certificate."),
    _gauge("gpu_memory_used_bytes", "Used memory of a GPU of this process.", "device"),
    _gauge("gpu_memory_limit_bytes", "Memory of a GPU of this process.", "device"),
    _gauge("gpu_utilization_ratio", "Share of the last second in which a GPU computed.", "device"),
)
"""The metrics that are read when Prometheus asks."""

METRICS = {metric.name: metric for metric in (*EVENTS, *STATES)}
"""All metrics by name."""
