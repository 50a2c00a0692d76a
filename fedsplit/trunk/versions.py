"""The versions of the trunk's trained parameters: the tensors of each, and the optimizer step.

An optimizer step in place would break every graph that is still outstanding. So the optimizer
owns master tensors, and the model's parameters are leaves of the current version that share
their memory. If no graph needs the current version, a step changes that memory in place and
copies nothing. Otherwise the masters move to new memory first, and the old leaves are kept until
their last graph is gone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsplit.errors import CheckpointError
from fedsplit.model.tensor_parallel import local_of
from fedsplit.optimization import PartOptimizer
from fedsplit.spec import TrainSpec
from fedsplit.trunk.shards import ShardLayout

PARAMETER, _MOMENT, _VERSION = "parameter/", "moment/", "version"


class ParameterVersions:
    """The versions of a trunk's trained parameters.

    Only the thread that owns the model may use it.

    Args:
        trunk: The model.
        trained: Names of the parameters that train.
        train: The settings of the optimizer.
        resident: Whether the model itself holds the current version from now on. If not, these
            are a copy of its parameters, and the model holds them only while `installed`.
        layout: Where the parameters are cut; by default it is read from the model.
    """

    def __init__(
        self,
        trunk: nn.Module,
        trained: Sequence[str],
        train: TrainSpec,
        *,
        resident: bool = True,
        layout: ShardLayout | None = None,
    ) -> None:
        self.current = 0
        self._resident = resident
        self._places = [(trunk.get_submodule(name.rpartition(".")[0]), name) for name in trained]
        self.layout = layout or ShardLayout(trunk, trained)
        values = {name: local_of(trunk.get_parameter(name)) for name in trained}
        # Replicas train apart, so each but the resident one needs memory of its own.
        if not resident:
            values = {name: value.clone() for name, value in values.items()}
        masters = {name: nn.Parameter(value) for name, value in values.items()}
        self._optimizer = PartOptimizer(masters, train)
        self._leaves: dict[int, dict[str, nn.Parameter]] = {}
        self._pins: Counter[int] = Counter()
        self._publish()

    def leaves(self, version: int) -> dict[str, nn.Parameter]:
        """Return the trained parameters of a version that is current or pinned, by name."""
        return self._leaves[version]

    @contextmanager
    def installed(self, version: int) -> Iterator[None]:
        """Make the model compute with `version` inside the block.

        A backward needs it as well, because recomputation reads the model's parameters.
        """
        if self._resident and version == self.current:
            yield
            return
        # Restored after the block, because the model may hold other replicas' or older leaves.
        before = {name: owner.get_parameter(_leaf(name)) for owner, name in self._places}
        self._install(self._leaves[version])
        try:
            yield
        finally:
            self._install(before)

    def pin(self, version: int) -> None:
        """Keep a version's tensors until they are unpinned."""
        self._pins[version] += 1

    def unpin(self, version: int) -> None:
        """Undo one `pin`; a version without pins is dropped unless it is current."""
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]
            if version != self.current:
                del self._leaves[version]

    def step(self, gradients: Mapping[str, Tensor], step: int, lr_scale: float = 1.0) -> None:
        """Apply gradients as optimizer step `step` and publish the next version."""
        self._leave_current()
        masters = self._optimizer.parameters
        for name, gradient in gradients.items():
            masters[name].grad = gradient
        self._optimizer.step(step, lr_scale=lr_scale)
        self.current += 1
        self._publish()

    def values(self) -> dict[str, Tensor]:
        """Return the current version's shards, by name; the next step may change them in place."""
        return {name: master.data for name, master in self._optimizer.parameters.items()}

    def whole(self) -> dict[str, Tensor]:
        """Return a copy of the current version's whole tensors; see `ShardLayout.whole`."""
        return {name: self.layout.whole(name, value) for name, value in self.values().items()}

    def kinds(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return the type and the shape of each whole tensor, by name."""
        return {n: (value.dtype, self.layout.shape(n, value)) for n, value in self.values().items()}

    def shards(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's shards of whole tensors like the parameters, on their devices."""
        here = self.values()
        return {n: self.layout.shard(n, t).to(here[n].device) for n, t in tensors.items()}

    def assign(self, values: Mapping[str, Tensor], version: int) -> None:
        """Publish these values as a version; the moments do not change.

        Args:
            values: The whole tensors by name.
            version: The version, which nothing is pinned to.
        """
        self._leave_current()
        for name, master in self._optimizer.parameters.items():
            master.data.copy_(self.layout.shard(name, values[name]))
        self.current = version
        self._publish()

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state of training, by name."""
        return {
            **{PARAMETER + name: value for name, value in self.whole().items()},
            **{
                _MOMENT + key: self._whole_moment(key, v)
                for key, v in self._optimizer.state().items()
            },
            _VERSION: torch.tensor(self.current),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned; no graph may be outstanding.

        Raises:
            CheckpointError: The state is not that of these parameters.
        """
        names = {name.removeprefix(PARAMETER) for name in state if name.startswith(PARAMETER)}
        values = self.values()
        if unmatched := sorted(names ^ values.keys()):
            raise CheckpointError(
                "the trunk's state and this trunk do not train the same parameters "
                f"({unmatched[0]} is in one of them only); resume with the model, split and lora "
                "it was saved with"
            )
        # In place, because the leaves and the model share this memory.
        for name, value in values.items():
            value.copy_(self.layout.shard(name, state[PARAMETER + name]))
        moments = {k.removeprefix(_MOMENT): v for k, v in state.items() if k.startswith(_MOMENT)}
        self._optimizer.load_state(
            {key: self.layout.shard(key.partition("|")[0], v) for key, v in moments.items()}
        )
        self._leaves[int(state[_VERSION])] = self._leaves.pop(self.current)
        self.current = int(state[_VERSION])

    def _whole_moment(self, key: str, moment: Tensor) -> Tensor:
        return self.layout.whole(key.partition("|")[0], moment)

    def _leave_current(self) -> None:
        """Prepare the masters for a change of their values."""
        # A graph of this version still needs its memory, so the masters get new memory.
        if self._pins[self.current]:
            for master in self._optimizer.parameters.values():
                master.data = master.data.clone()
        else:
            del self._leaves[self.current]

    def _publish(self) -> None:
        # `.data` shares the memory but not autograd's count of in-place changes.
        masters = self._optimizer.parameters.items()
        self._leaves[self.current] = {
            name: self.layout.leaf(name, master.data) for name, master in masters
        }
        if self._resident:
            self._install(self._leaves[self.current])

    def _install(self, leaves: Mapping[str, nn.Parameter]) -> None:
        # Not by setattr: libraries that build models replace `register_parameter` of all modules
        # meanwhile, and a client in another thread of this process may be building its model.
        for owner, name in self._places:
            owner._parameters[_leaf(name)] = leaves[name]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
