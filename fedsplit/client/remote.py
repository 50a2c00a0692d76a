"""The client's handle for its trunk: a layer to call, and an optimizer to step.

Shapes: B sequences, T tokens, D hidden width. Calling a `RemoteTrunk` sends hidden states to the
trunk and returns its output; autograd sends the gradients, so `loss.backward()` crosses the wire.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedsplit.client.autograd import (
    ClientSession,
    RemoteGraph,
    RemoteTrunkFunction,
    without_gradient,
)
from fedsplit.client.following import Follower, StepReminder
from fedsplit.client.instance import ServerInstance
from fedsplit.client.kv_session import CacheSession, TrunkCache, drained
from fedsplit.client.precision import Precision, may_overflow
from fedsplit.client.rpc import RpcClient
from fedsplit.errors import FedsplitError, ModelMismatch, ProtocolError, SessionLost
from fedsplit.link import Link
from fedsplit.model.identity import model_fingerprint, model_settings
from fedsplit.model.pass_through import calling_remote
from fedsplit.model.rope import tables_of
from fedsplit.model.stage import ClientPart
from fedsplit.randomness import draws
from fedsplit.spec import RunSpec
from fedsplit.spec.checks import one_of
from fedsplit.wire import messages as m
from fedsplit.wire.delta import DeltaEncoder

T = TypeVar("T")


class RemoteTrunk:
    """One client's session with a trunk.

    Args:
        link: The link to the trunk.
        model: The client's model; its config and the run's split must be the trunk's.
        run: The run that both sides were configured with.
        client: This client's name, for which its token was issued.
        served_model_name: The trunk's name at a server that has several; by default the first one.
        kv: The side that keeps the trunk's keys and values in generation: `server`, or `client`,
            in which case they travel with every token and the server keeps nothing.
        encoder_state: The references of the delta codec, as `encoder_state` returned them before.

    Attributes:
        client: The client's name.
        draws: Whether a training forward of the model draws random numbers.
        autocast: The precision that the trunk's run sets, known once a session is open; empty if
            it sets none, and the trunk's is that of the client.
        round, version: The session's round, and the trunk's version after this client's last step.
        instance: The server's process; it notices a restart.
        encoder: The delta codec of training forwards.
        watch: Follows an optimizer, or warns if nothing asks the trunk for a step.
    """

    def __init__(
        self,
        link: Link,
        model: ClientPart,
        run: RunSpec,
        *,
        client: str,
        served_model_name: str = "",
        kv: str = "server",
        encoder_state: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        one_of("kv", kv, ("server", "client"))
        self.client = client
        self.draws = draws(model)
        self._link = link
        self._identity: dict[str, Any] = {
            "client": client,
            "model": model_fingerprint(model.config, run.split),
            "config": run.fingerprint,
            "served_model_name": served_model_name,
            # The part's own dictionary: an adapter may be loaded later.
            "identity": model.identity,
        }
        self._settings: dict[str, Any] = {
            "model_settings": model_settings(model.config, run.split),
            "run_settings": run.texts,
        }
        tables = functools.partial(tables_of, model.config)
        self._cache_options: dict[str, Any] = {"stateless": kv == "client", "tables": tables}
        self._abandoned: list[str] = []
        self._caches: set[str] = set()
        self._dtype = model.dtype
        self._hidden_size: int = model.config.hidden_size
        self._mode = run.train.mode
        self.watch: StepReminder | Follower = StepReminder(model, run.train, client)
        self._place = model.remote
        self._wire = run.wire
        self.encoder = DeltaEncoder(run.wire, encoder_state)
        self._rpc = RpcClient(link, run, client=client, encoder=self.encoder)
        self._session: ClientSession | None = None
        self.round = self.version = 0
        self.instance = ServerInstance(client)
        self._precision, self.autocast = Precision(run.model), ""

    def open(self, round: int = 0, *, training: bool = True, first_call: int = 0) -> int:
        """Open a session in place of the previous one; return the trunk's parameter version.

        The trunk's dropout depends on the seed, the round and the call's number. In `isolated` mode
        the trunk only evaluates: it keeps no graph, uses no dropout, and no barrier waits for this
        client.

        Args:
            round: The round of the run.
            training: Whether the session trains.
            first_call: The number of the first call; a client that repeats work passes the number
                that it began with, and gets the same dropout.

        Raises:
            ServerRestarted: The server was started again, and its trunk has lost steps of this
                client.
            FedsplitError: The trunk refuses this client, or cannot be reached.
        """
        request = m.OpenRequest(
            protocol=m.PROTOCOL,
            hidden_size=self._hidden_size,
            round=round,
            training=training and self._mode != "isolated",
            last_instance_id=self.instance.id,
            # Evaluation does not depend on the run, so any run's client may evaluate.
            **(self._identity if training else {**self._identity, "config": ""}),
        )
        reply = self._rpc.open(request, self._settings)
        if reply.limits.hidden_size != self._hidden_size:
            raise ModelMismatch(
                f"the trunk's hidden size is {reply.limits.hidden_size}, but this model's is "
                f"{self._hidden_size}; build both from the same model"
            )
        self.watch.session_ended()
        # A step that was not taken is repeated, from the references that it began with.
        self.encoder.rollback()
        self._session = ClientSession(
            name=reply.session,
            trains=request.training,
            next_call=first_call,
            step_began=first_call,
        )
        self.round, self.version, self.autocast = round, reply.version, reply.autocast
        self.instance.opened(reply, continues=training and first_call > 0)
        return reply.version

    def close(self) -> None:
        """Close the session and those of deleted caches; the link stays open."""
        self.end_generations()
        if self._session:
            self.watch.session_ended()
            self._close(self._session.name)
        self._session = None

    @contextmanager
    def session(
        self, round: int = 0, *, training: bool = True, first_call: int = 0
    ) -> Iterator[None]:
        """A context with a session; after a failure it is closed with a single attempt."""
        self.open(round, training=training, first_call=first_call)
        try:
            yield
        except BaseException:
            with suppress(FedsplitError):
                self._link.exchange(m.CloseRequest(session=self._named_session()))
            raise
        self.close()

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: TrunkCache | None = None,
    ) -> Tensor:
        """The trunk's output for these hidden states, in their dtype.

        It has a gradient where autograd is enabled, and dropout where the model is in training
        mode. In `isolated` mode it is a constant without dropout.

        Raises:
            FedsplitError: The trunk refused, or could not be reached within the budget.
        """
        dtype = hidden_BTD.dtype
        self._precision.check_cut(dtype, self._dtype, hidden_BTD.device)
        # A model may be converted later, and under autocast some families leave another dtype.
        hidden_BTD = hidden_BTD.to(self._dtype)
        if cache is not None:
            return cache.carry(hidden_BTD, attention_mask_BT, position_ids_BT).to(dtype)
        # With positions, transformers looks for packed sequences if there is no mask.
        if attention_mask_BT is not None and position_ids_BT is None and attention_mask_BT.all():
            attention_mask_BT = None
        self.watch.before_forward()
        session = self._open_session()
        # The trunk keeps a graph only if a backward can follow.
        is_trained = session.trains and (hidden_BTD.requires_grad or self._mode == "joint")
        keeps_graph = torch.is_grad_enabled() and is_trained
        in_training = calling_remote(self._place).training and self._mode != "isolated"
        request = m.ForwardRequest(
            session=session.name,
            call=session.take_call(),
            training=keeps_graph,
            smashed_BTD=hidden_BTD.detach(),
            attention_mask_BT=attention_mask_BT,
            position_ids_BT=position_ids_BT,
            codec=self._wire.up,
            other_mode=keeps_graph != in_training,
            autocast=self._precision.of_forward(hidden_BTD.device, self.autocast),
        )
        run = self._run_with_graph if keeps_graph else self._run_without_graph
        return run(session, request, hidden_BTD).to(dtype)

    def _run_with_graph(
        self, session: ClientSession, request: m.ForwardRequest, hidden_BTD: Tensor
    ) -> Tensor:
        # Autograd calls a backward only if an input needs a gradient; the trunk always does.
        below_trains = hidden_BTD.requires_grad
        entering_BTD = hidden_BTD if below_trains else hidden_BTD.detach().requires_grad_()
        if self._wire.history_bytes:
            request = self.encoder.encode(request)
        graph = RemoteGraph(
            rpc=self._rpc,
            session=session,
            request=request,
            want_grad=below_trains,
            codec=self._wire.grad_up,
            may_overflow=may_overflow(request.autocast, self.autocast, self._dtype),
            watch=self.watch,
        )
        apply: Callable[..., Tensor] = RemoteTrunkFunction.apply
        return apply(entering_BTD, graph)

    def _run_without_graph(
        self, session: ClientSession, request: m.ForwardRequest, hidden_BTD: Tensor
    ) -> Tensor:
        out_BTD = self._rpc.exchange(request, in_turn=True).trunk_out_BTD.to(hidden_BTD.device)
        if not hidden_BTD.requires_grad or not torch.is_grad_enabled() or self._mode == "isolated":
            return out_BTD
        reason = "no gradient passes through a session that evaluates; open one with training=True"
        return without_gradient(out_BTD, hidden_BTD, reason)

    def examples(self, numbers_B: Tensor) -> AbstractContextManager[None]:
        """A context that names the examples of the training forwards in this thread.

        With `wire.history_bytes`, only the difference from the last step with the same example is
        sent.

        Args:
            numbers_B: The number of each sequence's example, int64; it stays the same for the whole
                run. Empty for sequences without numbers.
        """
        return self.encoder.of(numbers_B)

    # --- generation ---------------------------------------------------------------------------

    def new_cache(self, max_length: int | None = None) -> TrunkCache:
        """A KV cache at the trunk, growing or with a capacity of `max_length` tokens."""
        return TrunkCache(self._cache_session, max_length or 0, **self._cache_options)

    def _cache_session(self) -> CacheSession:
        return CacheSession(self.open_cache, self.exchange, self._caches.discard, self._abandoned)

    def open_cache(self, cache_tokens: int) -> str:
        """Open a session that generates, and close abandoned ones; return its name."""
        self.end_generations()
        request = m.OpenRequest(
            protocol=m.PROTOCOL,
            hidden_size=self._hidden_size,
            round=0,
            training=False,
            generating=True,
            cache_tokens=cache_tokens,
            **{**self._identity, "config": ""},  # generation does not depend on the run
        )
        session = self._rpc.open(request, self._settings).session
        self._caches.add(session)
        return session

    def end_generations(self) -> None:
        """Close the sessions of deleted caches; several threads may."""
        for session in drained(self._abandoned):
            self._close(session)

    def disconnect(self) -> None:
        """Close all sessions, with one attempt each and no retries."""
        with suppress(FedsplitError):  # the trunk ends the sessions of a lost connection itself
            for session in (*([self._session.name] if self._session else []), *self._caches):
                with suppress(SessionLost):
                    self._link.exchange(m.CloseRequest(session=session))
        self._caches.clear()
        self._abandoned.clear()

    # --- training -----------------------------------------------------------------------------

    @property
    def next_call(self) -> int:
        """Number of the next forward."""
        return self._session.next_call if self._session else 0

    @property
    def trunk_sq_norm(self) -> float:
        """Squared norm of the trunk's gradient since the last step; the loss scale is included."""
        return self._session.trunk_sq_norm if self._session else 0.0

    @property
    def encoder_state(self) -> Mapping[str, Tensor]:
        """The references of the delta codec, by name; empty without `wire.history_bytes`."""
        return self.encoder.state

    def run_pieces(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run micro-batches, `train.micro_batches` of them at a time; return their results."""
        return self._rpc.run_pieces(pieces)

    def step(
        self, *, step: int, num_tokens: int, client_sq_norm: float, loss_scale: float = 1.0
    ) -> None:
        """Contribute the accumulated gradient to the trunk's next step; return before that step.

        Args:
            step: How many optimizer steps this client has taken before.
            num_tokens: The contribution's weight among clients.
            client_sq_norm: Squared gradient norm of bottom and top, without the loss scale.
            loss_scale: The factor on the losses whose gradients have accumulated.

        Raises:
            StaleVersion: The trunk has a newer version; repeat the step in a new session.
        """
        session = self._open_session()
        request = m.StepRequest(
            session=session.name,
            call=session.next_call - 1,
            step=step,
            num_tokens=num_tokens,
            client_sq_norm=client_sq_norm,
            loss_scale=loss_scale,
        )
        self.version = self.instance.own_version = self.exchange(request).version
        session.stepped()
        self.watch.stepped()
        self.encoder.commit()

    def follow(self, optimizer: Optimizer, *, step: int = 0) -> Follower:
        """Contribute to the trunk's step before each step of this optimizer of the client weights.

        So any code that trains the client's model, such as the Trainer of transformers, also trains
        the trunk; `fedsplit.client.following` describes it. All clients have the same weight.

        Args:
            optimizer: Steps bottom and top. A session must be open before it does.
            step: How many optimizer steps this client has taken before.

        Returns:
            A handle; its `remove()`, or the end of a `with` block, ends the contributions.
        """
        self.watch = Follower(self, optimizer, self.watch, step)
        return self.watch

    def gradients(self, *, tensors: bool = False) -> m.GradientsReply:
        """The gradient accumulated at the trunk: its norm per block, and on request the tensors.

        With a loss scale they are multiplied by it.
        """
        return self.exchange(m.GradientsRequest(session=self._named_session(), tensors=tensors))

    def training_state(self) -> m.TrainingStateReply:
        """The state of the trunk's training: round, step, learning rate and version."""
        return self.exchange(m.TrainingStateRequest(session=self._named_session()))

    def service_info(self) -> m.ServiceInfoReply:
        """Description of the server; needs no session."""
        return self.exchange(
            m.ServiceInfoRequest(served_model_name=self._identity["served_model_name"])
        )

    def _close(self, session: str) -> None:
        self._caches.discard(session)
        with suppress(SessionLost):  # an earlier attempt may have closed it
            self.exchange(m.CloseRequest(session=session))

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Send a request, retry it if need be; return its reply, or raise the last failure."""
        return self._rpc.exchange(request)

    def _open_session(self) -> ClientSession:
        if not self._session:
            raise ProtocolError("no session is open; use `with trunk.session():` or trunk.open()")
        return self._session

    def _named_session(self) -> str:
        return self._open_session().name
