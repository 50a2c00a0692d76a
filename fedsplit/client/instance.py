"""The process that serves a client's trunk, and whether it was started again."""

from fedsplit.errors import ServerRestarted
from fedsplit.wire.messages import OpenReply


class ServerInstance:
    """What a client knows of the server's process, from the replies to its Open requests.

    Args:
        client: The client's name, for errors.

    Attributes:
        id: The process's `server_instance_id`; empty before the first session.
        save_every: That of the trunk.
        own_version: The first version of the trunk with all steps of this client; 0 before them.
        kept_version: The version up to which the trunk has the steps of the process before.
    """

    def __init__(self, client: str) -> None:
        self._client = client
        self.id = ""
        self.save_every = self.own_version = self.kept_version = 0

    def opened(self, reply: OpenReply, *, continues: bool) -> None:
        """Take over a reply.

        Args:
            reply: The reply.
            continues: Whether the session goes on with steps that the client has taken.

        Raises:
            ServerRestarted: The server was started again, with a version of the trunk without all
                steps of this client. Its next session is accepted.
        """
        is_restarted = self.id not in ("", reply.server_instance_id)
        self.id, self.save_every = reply.server_instance_id, reply.save_every
        self.kept_version = reply.kept_version
        # Not the trunk's present version, which may have grown by steps of other clients.
        if is_restarted and self.kept_version < (lost := self.own_version):
            self.own_version = self.kept_version
            raise ServerRestarted(
                f"the server was started again with version {self.kept_version} of the trunk, but "
                f"the weights of {self._client} belong to version {lost}; load the client's state "
                f"of version {self.kept_version} (`fit` with `states` does so by itself), or start "
                f"the server with version {lost}"
            )
        # These steps were taken with another handle.
        if continues and not self.own_version:
            self.own_version = reply.version
