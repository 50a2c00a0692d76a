"""The partition of a run's data, counted by label: as a table, a plot and JSON.

The amount of a label is its number of examples. If documents have no label, groups are counted in
its place, and the amount of a group is its number of bytes of text.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsplit import atomic
from fedsplit.console import table_text
from fedsplit.data import Corpus

# The number of labels that the table names for each client.
LARGEST = 3
# The number of labels with a color of their own in the plot: all colors of matplotlib's tab20.
COLORED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionStats:
    """The data of one client; `labels` has the amount of each label, the largest first."""

    client: str
    documents: int
    bytes: int
    labels: dict[str, int]

    @staticmethod
    def of(client: str, corpora: Sequence[Corpus]) -> "PartitionStats":
        """Count several corpora together."""
        documents = [document for corpus in corpora for document in corpus.documents]
        amounts = Counter[str]()
        for document in documents:
            amounts[document.label or document.group] += 1 if document.label else document.num_bytes
        return PartitionStats(
            client=client,
            documents=len(documents),
            bytes=sum(corpus.num_bytes for corpus in corpora),
            # By name too, so that labels of equal amount have a fixed order.
            labels=dict(sorted(amounts.items(), key=lambda pair: (-pair[1], pair[0]))),
        )

    @property
    def shares(self) -> dict[str, float]:
        """The share of each label in the client's data; the shares sum to one."""
        total = sum(self.labels.values())
        return {label: amount / total for label, amount in self.labels.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPartitions:
    """The data of each client, and of all clients together."""

    clients: tuple[PartitionStats, ...]
    total: PartitionStats
    labelled: bool

    @staticmethod
    def of(shards: Sequence[Corpus]) -> "RunPartitions":
        """Count the shards of a run, in the order of the clients."""
        return RunPartitions(
            clients=tuple(
                PartitionStats.of(f"client-{number}", [corpus])
                for number, corpus in enumerate(shards)
            ),
            total=PartitionStats.of("all", shards),
            labelled=any(document.label for corpus in shards for document in corpus.documents),
        )

    @property
    def skew(self) -> float:
        """The label skew of the partition, from 0 (all clients have the same labels) to 1.

        It is the mean over clients of the total variation distance (half the sum of absolute
        differences) between the shares of labels of the client and of all clients together.
        """
        total = self.total.shares

        def distance(shares: dict[str, float]) -> float:
            return sum(abs(share - shares.get(label, 0.0)) for label, share in total.items()) / 2

        return sum(distance(client.shares) for client in self.clients) / len(self.clients)

    @property
    def table(self) -> str:
        """A line per client, one for all clients together, and `skew`."""
        label, documents = ("label", "examples") if self.labelled else ("group", "documents")
        lines = [("client", documents, "bytes", "share", f"{label}s", f"largest {label}s")]
        for stats in (*self.clients, self.total):
            largest = list(stats.shares.items())[:LARGEST]
            lines.append(
                (
                    stats.client,
                    f"{stats.documents:,}",
                    f"{stats.bytes:,}",
                    f"{stats.bytes / self.total.bytes:.1%}",
                    f"{len(stats.labels)}",
                    ", ".join(f"{_short(name)} {share:.0%}" for name, share in largest),
                )
            )
        skew = f"skew {self.skew:.3f}: how unlike all together a client is, from 0 to 1"
        return f"{table_text(lines, right=range(1, 5))}\n{skew}"

    @property
    def json(self) -> str:
        """All counts, for other programs."""
        content = {
            "skew": self.skew,
            "unit": "examples" if self.labelled else "bytes",
            "all": asdict(self.total),
            "clients": [asdict(client) for client in self.clients],
        }
        return json.dumps(content, indent=2) + "\n"

    def plot(self, file: Path, title: str) -> None:
        """Draw a bar of labels per client: the largest have a color, all others are white."""
        names = [str(number) for number in range(len(self.clients))]
        colored = list(self.total.labels)[:COLORED]
        figure = Figure(figsize=(max(7.0, 2.5 + 0.3 * len(names)), 4.5), layout="constrained")
        # pyplot would keep the figure in a global list, and choose a display.
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        bottoms = [0] * len(names)
        for number, label in enumerate(colored):
            color = colormaps["tab20"](number)
            heights = [client.labels.get(label, 0) for client in self.clients]
            axes.bar(names, heights, bottom=bottoms, color=color, label=_in_legend(label))
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        rest = [
            sum(client.labels.values()) - low
            for client, low in zip(self.clients, bottoms, strict=True)
        ]
        if any(rest):
            axes.bar(names, rest, bottom=bottoms, color="white", ec="gray", label="others")
        axes.set_ylabel("examples" if self.labelled else "bytes")
        axes.set_xlabel("client")
        figure.suptitle(title, fontsize="medium", wrap=True)
        figure.legend(loc="outside right center", fontsize="small", reverse=True)
        with atomic.new_file(file) as unfinished:
            figure.savefig(unfinished, dpi=120)


def _short(label: str) -> str:
    """Return a label as one line of at most 24 characters."""
    plain = "".join(c if c.isprintable() else " " for c in label)
    return plain if len(plain) <= 24 else f"{plain[:21]}..."


def _in_legend(label: str) -> str:
    """Return a label for a legend of matplotlib.

    A dollar sign would begin a formula, and an underscore in front would hide the label.
    """
    return " " + _short(label).replace("$", r"\$")
