"""The other servers of the trunks that are served: a leader to follow, or followers to lead."""

import secrets
from dataclasses import dataclass

from fedsplit.errors import ConfigError
from fedsplit.model import TrunkPart
from fedsplit.ranks.group import Ranks
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.trunk.follower import FollowerService
from fedsplit.trunk.update import TrunkUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The other servers of the trunks of this one.

    Attributes:
        token: The token that the servers share, and no client has; empty if there is one server.
        leader: The address of the server that steps; empty at that server itself.
        wire: The trust in the leader's certificate, and the longest time of a call.
    """

    token: str = ""
    leader: str = ""
    wire: WireSpec = WireSpec()

    def check(
        self, run: RunSpec, update: type[TrunkUpdate], *, is_saved: bool, clients_token: str = ""
    ) -> None:
        """Refuse settings that several servers cannot share.

        Raises:
            ConfigError: The text names the setting.
        """
        if self.leader and not self.token:
            raise ConfigError(
                f"--leader {self.leader} takes no contributions from strangers; give the token "
                "that both servers share (--peers-token-file)"
            )
        if self.token and self.token == clients_token:
            raise ConfigError(
                "the servers' token (--peers-token-file) is that of the clients (--token-file), "
                "with which each client would be a server; make another one for the servers"
            )
        if self.leader and is_saved:
            raise ConfigError(
                f"--leader {self.leader} takes the steps and has the state to save; give "
                "--state-dir to that server"
            )
        if self.token and (run.policy.kind == "async" or run.policy.sim_slowdown):
            raise ConfigError(
                f"several servers share the steps of a trunk, and policy={run.policy.kind}"
                f"{' with policy.sim_slowdown' if run.policy.sim_slowdown else ''} does not allow "
                "it; use policy=sync or policy=quorum"
            )
        if self.token and (update.replicas or update.keeps_passes):
            raise ConfigError(
                "several servers share the steps of a trunk, and "
                f"strategy.target={run.strategy.target} does not allow it; use "
                "strategy=splitfed_v2"
            )

    def follower(
        self, name: str, trunk: TrunkPart, run: RunSpec, ranks: Ranks | None
    ) -> FollowerService:
        """Return the service of a trunk that follows the trunk of this name at the leader.

        Args:
            name: The trunk's name.
            trunk: The trunk part, or the shard of this rank.
            run: The run, which must be the leader's.
            ranks: Those of this server, of which this is the first.
        """
        service = FollowerService(
            trunk,
            run,
            lambda: GrpcLink(self.leader, token=self.token, wire=self.wire),
            self.token,
            name=f"server-{secrets.token_hex(4)}",
            served_model_name=name,
            channel=ranks,
        )
        if ranks:
            ranks.lead(trunk, service.lose)
        return service


ALONE = Peers()
"""No other servers."""
