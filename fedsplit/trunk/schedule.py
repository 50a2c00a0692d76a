"""The schedule of a trunk: counts the steps of each client, which decide the learning rate."""

import logging

log = logging.getLogger(__name__)


class Schedule:
    """Counts the accepted steps of each client.

    A step has the learning rate of its client's count, or the largest count of its clients. A
    client sends its own count, which is lower than the trunk's if it repeats a round. A higher one
    would move the schedule ahead, so the trunk's is used in its place. A client that is not counted
    yet, such as one of a resumed run, may be as far as the clients were before.

    Args:
        position: The largest step count of the clients so far.
    """

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self._counts: dict[str, int] = {}

    def place_of(self, client: str, claimed: int) -> int:
        """Return the place of a client's next step, which it claims to be `claimed`."""
        most = self._counts.get(client, self.position)
        if claimed > most:
            log.warning(
                "%s counts %d steps, but the trunk accepted %d; the trunk's count is used",
                client,
                claimed,
                most,
            )
        return min(claimed, most)

    def accepted(self, client: str, place: int) -> None:
        """Count a step of a client that was accepted for this place."""
        self._counts[client] = place + 1

    def taken(self, place: int) -> None:
        """Move the position to the end of a step that was taken at this place."""
        self.position = max(self.position, place + 1)

    def forget(self, client: str) -> None:
        """Drop the count of a client."""
        self._counts.pop(client, None)
