"""Whether a model's name can be loaded: it is a directory, or a hub id and the hub answers."""

import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from fedsplit.errors import CheckpointError, ConnectionLost

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TIMEOUT_S = 5.0


def require_reachable(name: str, revision: str = "main") -> None:
    """Refuse a name that cannot be loaded; the hub's libraries would try for a minute.

    Args:
        name: A directory, or a hub id.
        revision: The revision of a hub id.

    Raises:
        CheckpointError: The name is neither a directory nor a hub id.
        ConnectionLost: The model is not in the hub's cache here, and the hub does not answer.
    """
    if Path(name).is_dir():
        return
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: there is no such directory, and a hub id has the form NAME or OWNER/NAME; "
            "correct the path"
        )
    # Where the libraries are offline, they do not try.
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as exc:
        reason = getattr(exc, "reason", exc)
        # The libraries have their own list of authorities.
        if isinstance(reason, ssl.SSLError):
            return
        raise ConnectionLost(
            f"{name}: there is no such directory here, the model is not in the hub's cache, and "
            f"the hub {constants.ENDPOINT} does not answer ({reason}); check the path or the "
            "network, or download the model where there is one and give its directory"
        ) from exc
