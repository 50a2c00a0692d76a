"""Partitioners of flwr-datasets: any of its classes, by import path, partitions the items.

The partitioner gets a `datasets.Dataset` with a row per item and the columns `item` (its number),
`label` (its label, or its group if it has none), `group` and `num_bytes`.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedsplit.data.corpora import Document
from fedsplit.errors import DataError


def load_partitions(
    items: Sequence[Document],
    target: str,
    options: Mapping[str, Any],
    num_clients: int,
    seed: int,
) -> list[list[Document]]:
    """Return the partitions that a partitioner makes of items; it may leave items out.

    Args:
        items: The items to partition.
        target: Import path of the class, such as `flwr_datasets.partitioner.LinearPartitioner`.
        options: Arguments of the class. If it has the parameters `num_partitions`,
            `partition_by` and `seed`, their defaults are `num_clients`, "label" and `seed`.
        num_clients: The required number of partitions.
        seed: Seed of the partitioner's generator.

    Returns:
        Each client's items, in the partitioner's order.

    Raises:
        DataError: The class cannot be imported or is no partitioner, it refuses the options or
            the data, or its partitions are not `num_clients` disjoint and non-empty sets of items.
    """
    make, as_dataset = _resolve(target)
    defaults = {"num_partitions": num_clients, "partition_by": "label", "seed": seed}
    parameters = inspect.signature(make).parameters
    # Partitioners have no common signature.
    arguments = {name: value for name, value in defaults.items() if name in parameters}
    arguments |= options
    columns = {
        "item": list(range(len(items))),
        "label": [item.label or item.group for item in items],
        "group": [item.group for item in items],
        "num_bytes": [item.num_bytes for item in items],
    }
    try:
        partitions = list(_partitions(make(**arguments), as_dataset(columns), num_clients))
    # The class is any one that the config names: these are the errors of a wrong argument.
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as exc:
        raise DataError(
            f"{target} with {arguments} cannot partition {len(items)} items, which have the "
            f"columns {', '.join(columns)}: {exc}; change sharding.options"
        ) from exc
    _check(partitions, target, num_clients)
    return [[items[number] for number in numbers] for numbers in partitions]


def _resolve(target: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the class, and the function that makes a data set of columns; nothing is called."""
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import Partitioner

        partitioner = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as exc:
        raise DataError(
            f"sharding.target={target} cannot be imported ({exc}); give an import path, such as "
            "flwr_datasets.partitioner.LinearPartitioner, which needs: "
            "pip install 'fedsplit[partitioners]'"
        ) from exc
    if not (inspect.isclass(partitioner) and issubclass(partitioner, Partitioner)):
        raise DataError(
            f"sharding.target={target} is {partitioner!r}; name a subclass of "
            "flwr_datasets.partitioner.Partitioner"
        )
    return partitioner, Dataset.from_dict


def _partitions(partitioner: Any, dataset: Any, num_clients: int) -> Iterator[list[int]]:
    """Yield the numbers of the items of each partition."""
    # Some partitioners know their number of partitions only from the data.
    partitioner.dataset = dataset
    if partitioner.num_partitions != num_clients:
        raise ValueError(
            f"it makes {partitioner.num_partitions} partitions, but there are {num_clients} clients"
        )
    for client in range(num_clients):
        yield partitioner.load_partition(client)["item"]


def _check(partitions: list[list[int]], target: str, num_clients: int) -> None:
    empty = [client for client, numbers in enumerate(partitions) if not numbers]
    if empty:
        raise DataError(
            f"{target} makes an empty partition for client {empty[0]} of {num_clients}; lower "
            "clients, or change sharding.options"
        )
    assigned = [number for numbers in partitions for number in numbers]
    if len(set(assigned)) < len(assigned):
        raise DataError(
            f"{target} assigns an item to two clients; sharding needs disjoint partitions"
        )
