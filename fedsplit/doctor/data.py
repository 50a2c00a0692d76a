"""Checks of a SuperNode's config, and of the paths in it: data, models and keys."""

import difflib
from pathlib import Path

from fedsplit.client.seal import Seal
from fedsplit.config.authority import NODE_CONFIG
from fedsplit.data.files import existing, files_under, read_text
from fedsplit.doctor.machine import mib
from fedsplit.doctor.result import Result, fail, ok, skipped
from fedsplit.doctor.subject import NodeConfig
from fedsplit.errors import ConfigError, DataError

_PATHS = ("data-path", "state-dir", "tls-ca", "allowed-path", "seal-key", "public-text")
# A whole corpus may be larger than the memory, and takes long.
_READ_BYTES = 16 << 20


def check_node_config(config: NodeConfig) -> Result:
    """Check the keys of a node's config, its paths, and its place among the clients."""
    if not config:
        return skipped("node config", "no --node-config was given")
    wrong = []
    for key in config:
        if key not in NODE_CONFIG:
            near = difflib.get_close_matches(key, NODE_CONFIG, n=1)
            wrong.append(f"there is no {key}" + (f"; did you mean {near[0]}?" if near else ""))
    wrong += [
        f"{key}={config[key]} is not an absolute path"
        for key in _PATHS
        if key in config and not Path(str(config[key])).is_absolute()
    ]
    number, among = config.get("partition-id"), config.get("num-partitions")
    if number is None and "data-path" not in config:
        wrong.append("it has neither partition-id nor data-path")
    elif number is not None and not _is_partition(number, among):
        of_all = "" if among is None else f" of num-partitions={among}"
        wrong.append(f"partition-id={number} is not one{of_all}, from 0 on")
    if wrong:
        return fail("node config", "; ".join(wrong), "correct the --node-config of the SuperNode")
    if number is None:
        return ok("node config", "the server gives it a number")
    return ok("node config", f"client {number}" + ("" if among is None else f" of {among}"))


def _is_partition(number: object, among: object) -> bool:
    # Without num-partitions, it is one of as many as a run has clients.
    if not (isinstance(number, int) and number >= 0):
        return False
    return among is None or (isinstance(among, int) and number < among)


def check_data_path(path: str) -> Result:
    """Check that a client's data are files of text that this user can read, and enough of them."""
    if not path:
        return skipped("data-path", "none was given, so the client takes its share of the corpus")
    try:
        root = existing(path, "text", "a file or directory")
        files = files_under(root) if root.is_dir() else [root]
        left = _READ_BYTES
        for file in files:
            if left > 0:
                left -= file.stat().st_size
                read_text(file)
            else:
                file.open("rb").close()
        size = sum(file.stat().st_size for file in files)
        unit, groups = "file", len(files)
        if not root.is_dir():
            unit, groups = "line", len(read_text(root).strip().split("\n"))
    except (DataError, OSError) as exc:
        found = str(exc).replace("data.path", "data-path")
        return fail("data-path", found, "correct the path, the permissions or the file")
    if not size:
        return fail(
            "data-path", f"{path} has no text", "name the folder that has the client's text"
        )
    if groups < 2:
        found = f"{path} has one {unit}, and a part of the {unit}s is held out"
        return fail("data-path", found, "divide the text into several files, or lines of one file")
    return ok("data-path", f"{groups:,} {unit}s with {mib(size)}")


def check_allowed_path(path: str) -> Result:
    """Check that the folder that runs may read is there."""
    if not path:
        return skipped("allowed-path", "none was given, so runs name ids of the hub only")
    if not Path(path).is_dir():
        return fail("allowed-path", f"{path} is not a folder", "make it, or correct the path")
    return ok("allowed-path", f"{path} is a folder")


def check_seal_key(file: str) -> Result:
    """Check the key that the clients share."""
    if not file:
        return skipped("seal-key", "none was given")
    try:
        Seal.of(Path(file))
    except ConfigError as exc:
        return fail("seal-key", str(exc), "copy the key of the other clients to this machine")
    return ok("seal-key", f"{file} has a key")


def check_public_text(file: str) -> Result:
    """Check the public text that the size of the noise comes from."""
    if not file:
        return skipped("public-text", "none was given")
    try:
        text = read_text(existing(file, "text", "a file"))
    except DataError as exc:
        found = str(exc).replace("data.path", "public-text")
        return fail("public-text", found, "name a file of text that everyone may read")
    return ok("public-text", f"{file} has {len(text):,} characters")


PATH_CHECKS = {
    "data-path": check_data_path,
    "allowed-path": check_allowed_path,
    "seal-key": check_seal_key,
    "public-text": check_public_text,
}
"""The checks of paths in a node's config, by the key."""
