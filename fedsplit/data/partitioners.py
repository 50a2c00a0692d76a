"""Partitioners of flwr-datasets: any of its classes, by import path, deals out items.

The class sees a `datasets.Dataset` with a row per item and the columns `item` (its number),
`label` (its label, or its group where it has none), `group` and `num_bytes`.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedsplit.data.corpora import Document
from fedsplit.errors import DataError


def partition(
    items: Sequence[Document],
    target: str,
    options: Mapping[str, Any],
    num_clients: int,
    seed: int,
) -> list[list[Document]]:
    """Deal items as a partitioner does; what it leaves out is nobody's.

    Args:
        items: What to deal out.
        target: Import path of the class, such as `flwr_datasets.partitioner.LinearPartitioner`.
        options: What it is made with. Where it takes `num_partitions`, `partition_by` and `seed`
            and they are not among the options, they are `num_clients`, "label" and `seed`.
        num_clients: How many partitions there must be.
        seed: Decides what the partitioner draws.

    Returns:
        Each client's items, in the order that the partitioner gives them.

    Raises:
        DataError: The class is not there, refuses options or data, or its partitions are not
            `num_clients` parts of the items, none empty and none with an item of another.
    """
    make, as_dataset = _resolve(target)
    known = {"num_partitions": num_clients, "partition_by": "label", "seed": seed}
    takes = inspect.signature(make).parameters
    given = {name: value for name, value in known.items() if name in takes} | dict(options)
    columns = {
        "item": list(range(len(items))),
        "label": [item.label or item.group for item in items],
        "group": [item.group for item in items],
        "num_bytes": [item.num_bytes for item in items],
    }
    try:
        parts = list(_parts(make(**given), as_dataset(columns), num_clients))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as exc:
        raise DataError(
            f"{target} with {given} cannot deal {len(items)} items, which have the columns "
            f"{', '.join(columns)}: {exc}; change sharding.options"
        ) from exc
    _check(parts, target, num_clients)
    return [[items[number] for number in part] for part in parts]


def _resolve(target: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The class, and what makes a data set for it."""
    try:
        from datasets import Dataset

        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as exc:
        raise DataError(
            f"sharding.target={target} cannot be imported ({exc}); give an import path, such as "
            "flwr_datasets.partitioner.LinearPartitioner, which needs: "
            "pip install 'fedsplit[partitioners]'"
        ) from exc
    if not inspect.isclass(found):
        raise DataError(f"sharding.target={target} is {found!r}; give the path of a class")
    return found, Dataset.from_dict


def _parts(partitioner: Any, dataset: Any, num_clients: int) -> Iterator[list[int]]:
    """The numbers of the items of each partition."""
    partitioner.dataset = dataset
    if partitioner.num_partitions != num_clients:
        raise ValueError(
            f"it makes {partitioner.num_partitions} partitions, but there are {num_clients} clients"
        )
    for client in range(num_clients):
        yield partitioner.load_partition(client)["item"]


def _check(parts: list[list[int]], target: str, num_clients: int) -> None:
    empty = [client for client, part in enumerate(parts) if not part]
    if empty:
        raise DataError(
            f"{target} gives nothing to client {empty[0]} of {num_clients}; lower clients, or "
            "change sharding.options"
        )
    dealt = [number for part in parts for number in part]
    if len(set(dealt)) < len(dealt):
        raise DataError(f"{target} gives an item to two clients; sharding needs parts of the data")
