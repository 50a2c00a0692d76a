"""The states of served trunks on disk: saved while they train, and read at the next start."""

import json
import logging
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fedsplit import atomic
from fedsplit.errors import CheckpointError, ConfigError, StorageError
from fedsplit.serve.state_folder import StateFolder
from fedsplit.spec import RunSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.sessions import AcceptedStep
from fedsplit.wire.messages import ServiceInfoRequest

log = logging.getLogger(__name__)

_TRUNK, _STARTS = "trunk", "starts.json"
_MOST_STARTS = 64


class TrunkStates:
    """The states of a server's trunks; as a context it locks their folder.

    Args:
        folder: The folder, with a folder of each trunk; it is made if it does not exist.
        every: A trunk is saved at each version that is a multiple of this number.

    Raises:
        ConfigError: `every` is not positive.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise ConfigError(f"save_every={every} must be 1 or more")
        self.folder = folder
        self.every = every
        self._savers: dict[str, TrunkSaver] = {}
        self._locked = ExitStack()

    def __enter__(self) -> "TrunkStates":
        """Lock the folder.

        Raises:
            ConfigError: Another server uses it.
            StorageError: It cannot be made.
        """
        atomic.make_folder(self.folder)
        with atomic.writing(self.folder), ExitStack() as opened:
            file = opened.enter_context((self.folder / "lock").open("a"))
            if not atomic.lock(file, self.folder):
                raise ConfigError(
                    f"{self.folder} is in use by another server; stop that one, or choose another "
                    "folder"
                )
            self._locked = opened.pop_all()
        return self

    def __exit__(self, *_: TracebackType | object) -> None:
        self._locked.close()

    @property
    def versions(self) -> dict[str, int]:
        """The version that each trunk was restored at; 0 without a state."""
        return {name: saver.restored for name, saver in self._savers.items()}

    @property
    def last_steps(self) -> dict[str, dict[str, AcceptedStep]]:
        """The last step of each client that the restored state of each trunk has."""
        return {name: saver.steps for name, saver in self._savers.items()}

    def restore(self, services: Mapping[str, TrunkService], run: RunSpec) -> None:
        """Load the newest intact state of each trunk, and save the trunks from now on.

        Args:
            services: The trunks by name; none has started.
            run: The run that they serve.

        Raises:
            CheckpointError: No state of a trunk is intact, or they are those of another model.
            ConfigError: They were saved with other settings.
            StorageError: The folder cannot be written.
        """
        self._savers = {
            name: TrunkSaver(service, run, self.folder / name, self.every)
            for name, service in services.items()
        }

    def finish(self) -> None:
        """Save the trunks, which have ended, if they have trained since they were last saved."""
        for saver in self._savers.values():
            saver.finish()


class TrunkSaver:
    """Saves the state of one trunk, and restores it.

    A state is copied by the engine's thread and written by another one, so training waits only if
    the state before it is not written yet. Beside the states there is a file with what has happened
    since the last of them: the server's starts, each with the version up to which the trunk has the
    steps that were taken at it, and the clients that have joined, whose steps a restarted trunk
    must wait for.

    Args:
        service: The trunk's service, which has not started.
        run: The run that it serves.
        folder: The folder of its states.
        every: See `TrunkStates`.

    Attributes:
        restored: The version that the trunk begins with.
        steps: The last steps of its clients in that version.
    """

    def __init__(self, service: TrunkService, run: RunSpec, folder: Path, every: int) -> None:
        self._engine = service.engine
        model = service.handle(ServiceInfoRequest(), "").model
        owner = f"the trunk {folder.name} (model and cut {model})"
        self._states = StateFolder(folder, run, owner, keep=2)
        self._every = every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="trunk-saver")
        self._writing: Future[None] | None = None
        self._present: frozenset[str] = frozenset()
        # The version at which each client has joined last.
        self._joined: dict[str, int] = {}
        self._starts: dict[str, int] = {}
        self._read_starts()
        self.steps: dict[str, AcceptedStep] = {}
        self.restored = self._saved = self._restore(service)
        self._starts = {k: min(v, self.restored) for k, v in self._starts.items()}
        service.past_instances = dict(list(self._starts.items())[-_MOST_STARTS:])
        # At the next start, no step above the version that it begins with is left.
        self._starts = service.past_instances | {service.server_instance_id: sys.maxsize}
        self._write_starts()
        service.save_every = every
        service.engine.at_rest = self._at_rest

    def finish(self) -> None:
        """Save the trunk, which has ended, if it has trained since it was last saved."""
        engine = self._engine
        failed = engine.ended.done() and engine.ended.exception()
        if waiting := engine.training.barrier.contributors:
            log.warning(
                "%s: the step of %s was not finished, so its state is not saved; the clients go "
                "back to version %d",
                self._states.folder,
                ", ".join(sorted(waiting)),
                self._saved,
            )
        elif engine.version > self._saved and not failed:
            self._save(engine.version)
        self._writer.shutdown()

    # --- restore ------------------------------------------------------------------------------

    def _restore(self, service: TrunkService) -> int:
        numbers = self._states.numbers
        if not numbers:
            self._await(set(self._joined))
            return 0
        for number in reversed(numbers):
            try:
                facts, tensors = self._states.load(number, (_TRUNK,))
            except CheckpointError as exc:
                if number == numbers[0]:
                    raise CheckpointError(
                        f"no state of the trunk in {self._states.folder} can be used: {exc}; "
                        "remove the folder to train from the beginning"
                    ) from exc
                log.error("%s; the state before it is used", exc)
            else:
                break
        self._states.remove_after(number)
        service.engine.load_state(tensors[_TRUNK])
        self.steps = {k: AcceptedStep(**step) for k, step in facts["steps"].items()}
        service.resume(self.steps)
        joined_since = {k for k, version in self._joined.items() if version >= number}
        self._await(joined_since | set(facts["clients"]))
        return number

    def _await(self, clients: set[str]) -> None:
        if clients:
            log.warning(
                "%s: %s trained when the server ended; the first step waits for them up to "
                "policy.deadline_s",
                self._states.folder,
                ", ".join(sorted(clients)),
            )
            most = len(clients)
            # Not waited for: the engine does this before all else when it starts.
            self._engine.expect(clients, at_once=most, close_after=most, until=float("inf"))

    def _read_starts(self) -> None:
        path = self._states.folder / _STARTS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._starts, self._joined = found["starts"], found["joined"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as exc:
            log.error("%s cannot be read (%r); all clients go back to version 0", path, exc)

    def _write_starts(self) -> None:
        text = json.dumps({"starts": self._starts, "joined": self._joined})
        atomic.write_text(self._states.folder / _STARTS, text)

    # --- save, on the engine's thread ---------------------------------------------------------

    def _at_rest(self) -> None:
        version, present = self._engine.version, self._engine.training.barrier.present
        if joined := present - self._present:
            self._note_clients(joined, version)
        self._present = present
        # Also when all have left, so that work that is over is not lost.
        is_due = version // self._every > self._saved // self._every or not present
        if version > self._saved and is_due:
            self._save(version)

    def _note_clients(self, joined: frozenset[str], version: int) -> None:
        oldest = min(self._states.numbers, default=0)
        kept = {k: v for k, v in self._joined.items() if v >= oldest}
        self._joined = kept | dict.fromkeys(joined, version)
        try:
            self._write_starts()
        except StorageError as exc:
            log.error("%s; after a kill the trunk would not wait for its clients", exc)

    def _save(self, version: int) -> None:
        if self._writing:
            self._writing.result()
        self._saved = version
        facts: dict[str, Any] = {
            "clients": sorted(self._present),
            "steps": {k: asdict(step) for k, step in dict(self._engine.last_steps).items()},
        }
        self._writing = self._writer.submit(self._write, version, facts, self._engine.state())

    def _write(self, version: int, facts: dict[str, Any], state: Mapping[str, Tensor]) -> None:
        try:
            self._states.save(version, facts, {_TRUNK: dict(state)})
        except StorageError as exc:
            log.error("the trunk at version %d is not saved: %s", version, exc)
