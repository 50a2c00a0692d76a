"""The trunk's parameters over time: which tensors belong to which version, and the step between.

An optimizer step in place would break every graph that is still outstanding. So the optimizer
owns master tensors, and the model's parameters are leaves of the current version that share
their memory. While no graph needs the current version, a step changes that memory in place and
copies nothing; otherwise the masters move to fresh memory first and the old leaves live on until
their last graph is gone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from fedsplit.optimization import PartOptimizer
from fedsplit.spec import TrainSpec


class ParameterVersions:
    """The versions of a trunk's trained parameters.

    Only the thread that owns the model may use it.

    Args:
        trunk: The model; from now on its trained parameters are replaced at every step.
        trained: Names of the parameters that train.
        train: What the optimizer does.
    """

    def __init__(self, trunk: nn.Module, trained: Sequence[str], train: TrainSpec) -> None:
        self.current = 0
        self._places = [(trunk.get_submodule(name.rpartition(".")[0]), name) for name in trained]
        masters = {name: nn.Parameter(trunk.get_parameter(name).data) for name in trained}
        self._optimizer = PartOptimizer(masters, train)
        self._leaves: dict[int, dict[str, nn.Parameter]] = {}
        self._pins: Counter[int] = Counter()
        self._publish()

    def leaves(self, version: int) -> dict[str, nn.Parameter]:
        """The trained parameters of a version that is current or pinned, by name."""
        return self._leaves[version]

    @contextmanager
    def installed(self, version: int) -> Iterator[None]:
        """Have the model compute with `version`, as recomputation inside a backward must."""
        if version == self.current:
            yield
            return
        self._install(self._leaves[version])
        try:
            yield
        finally:
            self._install(self._leaves[self.current])

    def pin(self, version: int) -> None:
        """Keep a version's tensors until they are unpinned."""
        self._pins[version] += 1

    def unpin(self, version: int) -> None:
        """Let a version go that was pinned once."""
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]
            if version != self.current:
                del self._leaves[version]

    def step(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Apply gradients as optimizer step `step` and publish the next version."""
        masters = self._optimizer.parameters
        if self._pins[self.current]:
            for master in masters.values():
                master.data = master.data.clone()
        else:
            del self._leaves[self.current]
        for name, gradient in gradients.items():
            masters[name].grad = gradient
        self._optimizer.step(step)
        self.current += 1
        self._publish()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's moments, by name."""
        return self._optimizer.state()

    def _publish(self) -> None:
        # `.data` shares the memory but not autograd's count of in-place changes.
        masters = self._optimizer.parameters.items()
        self._leaves[self.current] = {name: nn.Parameter(master.data) for name, master in masters}
        self._install(self._leaves[self.current])

    def _install(self, leaves: Mapping[str, nn.Parameter]) -> None:
        # Not by setattr: libraries that build models replace `register_parameter` of all modules
        # for a while, and a client may be building its own in another thread of this process.
        for owner, name in self._places:
            owner._parameters[name.rpartition(".")[2]] = leaves[name]
