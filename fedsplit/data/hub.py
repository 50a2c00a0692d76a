"""The Hugging Face hub: whether a name can be loaded, whether the hub answers, and full disks."""

import errno
import functools
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from fedsplit.errors import CheckpointError, ConnectionLost, StorageError

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# One of these is in the cache if a model, an adapter or a tokenizer is.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
_TIMEOUT_S = 5.0
# A model is several files, and clients of one process load it one after another.
_ASKED_AGAIN_AFTER_S = 60.0
_LOADING = threading.Lock()


def offline_reason(name: str, revision: str = "main") -> str:
    """Return why a model has to be loaded from the hub's cache; empty for a directory or online.

    The hub's libraries do not ask first: without a network, they try for half a minute for each
    file that is not in the cache, also for those that the model does not have.

    Args:
        name: A directory, or a hub id.
        revision: The revision of a hub id.

    Raises:
        CheckpointError: The name is neither a directory nor a hub id, or the libraries are offline
            and the model is not in the hub's cache here.
        ConnectionLost: The model is not in the hub's cache here, and the hub does not answer.
    """
    if Path(name).is_dir():
        return ""
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: there is no such directory, and a hub id has the form NAME or OWNER/NAME; "
            "correct the path"
        )
    found = [try_to_load_from_cache(name, file, revision=revision) for file in _CONFIGS]
    cached = any(isinstance(path, str) for path in found)
    missing = f"{name}: there is no such directory here, the model is not in the hub's cache, and "
    if constants.HF_HUB_OFFLINE:
        reason = "the hub is not asked since HF_HUB_OFFLINE is set"
        if not cached:
            raise CheckpointError(f"{missing}{reason}; correct the path, or unset HF_HUB_OFFLINE")
        return reason
    reason = _no_answer_lately()
    if reason and not cached:
        raise ConnectionLost(
            f"{missing}{reason}; check the path or the network, or download the model where there "
            "is one and give its directory"
        )
    return reason


@contextmanager
def loading_data_set(name: str, datasets: Any) -> Iterator[None]:
    """A context in which `datasets` loads a data set, from its own cache if the hub is silent.

    Without it, the library asks for half a minute before it takes the copy in its cache.

    Args:
        name: A directory, or a hub id.
        datasets: The library.

    Raises:
        ConnectionLost: The data set is not in the cache here, and the hub does not answer.
    """
    # The setting is the process's, and another thread must not take it for the user's.
    with _LOADING:
        # Offline, the library fails at once, as it does with a name of another form.
        is_of_hub = _HUB_ID.fullmatch(name) and not Path(name).is_dir()
        asks = is_of_hub and not datasets.config.HF_HUB_OFFLINE
        reason = _no_answer_lately() if asks else ""
        if not reason:
            yield
            return
        datasets.config.HF_HUB_OFFLINE = True
        try:
            yield
        except ConnectionError as exc:
            raise ConnectionLost(
                f"data.path={name}: there is no such directory here, the data set is not in the "
                f"cache of datasets, and {reason}; check the path or the network, or download the "
                "data set where there is one and give its directory"
            ) from exc
        finally:
            datasets.config.HF_HUB_OFFLINE = False


def _no_answer_lately() -> str:
    return _no_answer(constants.ENDPOINT, int(time.monotonic() // _ASKED_AGAIN_AFTER_S))


@functools.lru_cache(maxsize=1)
def _no_answer(endpoint: str, period: int) -> str:
    """Return why the hub cannot be reached; empty if it answers. It is asked once a `period`."""
    try:
        urllib.request.urlopen(endpoint, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return ""
    # The latter two: another program's answer, and an HF_ENDPOINT that is no address.
    except (OSError, HTTPException, ValueError) as exc:
        reason = getattr(exc, "reason", exc)
        # The libraries have their own list of authorities.
        if not isinstance(reason, ssl.SSLError):
            return f"the hub {endpoint} does not answer ({reason})"
    return ""


@contextmanager
def reporting_a_full_disk(name: str) -> Iterator[None]:
    """A context that downloads files of a model.

    Raises:
        StorageError: The disk of the hub's cache is full.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as exc:
        if not is_full(exc):
            raise
        raise StorageError(
            f"{name} cannot be downloaded: no space left under {constants.HF_HUB_CACHE}, the hub's "
            "cache; make room, or set HF_HOME to a folder on another disk"
        ) from exc


def is_full(exc: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is that of a full disk."""
    while exc:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        # Libraries in Rust raise their own types, which contain the text of Rust's I/O errors.
        if f"(os error {errno.ENOSPC})" in str(exc):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
