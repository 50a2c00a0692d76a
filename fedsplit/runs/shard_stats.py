"""Who has what: the shards of a run counted by label, as a table, a picture and JSON.

The amount of a label (or of a group, where documents have no label) is counted in examples, and
in bytes of text where documents are no examples.
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

LARGEST = 3  # labels that the table names for each client
COLORED = 20  # labels that have a color of their own in the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionStats:
    """What one client has; `labels` is how much it has of each, the largest first."""

    client: str
    documents: int
    bytes: int
    labels: dict[str, int]

    @staticmethod
    def of(client: str, corpora: Sequence[Corpus]) -> "PartitionStats":
        """Count some corpora as one."""
        documents = [document for corpus in corpora for document in corpus.documents]
        amounts = Counter[str]()
        for document in documents:
            amounts[document.label or document.group] += 1 if document.label else document.num_bytes
        return PartitionStats(
            client=client,
            documents=len(documents),
            bytes=sum(corpus.num_bytes for corpus in corpora),
            labels=dict(sorted(amounts.items(), key=lambda pair: (-pair[1], pair[0]))),
        )

    @property
    def shares(self) -> dict[str, float]:
        """The labels' shares of what the client has; they sum to one."""
        total = sum(self.labels.values())
        return {label: amount / total for label, amount in self.labels.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPartitions:
    """What each client has, and all of them together."""

    clients: tuple[PartitionStats, ...]
    everybody: PartitionStats
    labelled: bool

    @staticmethod
    def of(shards: Sequence[Corpus]) -> "RunPartitions":
        """Count shards, that of client-0 first."""
        return RunPartitions(
            clients=tuple(
                PartitionStats.of(f"client-{number}", [corpus])
                for number, corpus in enumerate(shards)
            ),
            everybody=PartitionStats.of("all", shards),
            labelled=any(document.label for corpus in shards for document in corpus.documents),
        )

    @property
    def skew(self) -> float:
        """How unlike the clients are: 0 if all have the same labels, up to 1.

        The mean over clients of the total variation distance (half the sum of absolute
        differences) between the shares of labels of the client and of all clients together.
        """
        everybody = self.everybody.shares

        def distance(shares: dict[str, float]) -> float:
            return (
                sum(abs(share - shares.get(label, 0.0)) for label, share in everybody.items()) / 2
            )

        return sum(distance(client.shares) for client in self.clients) / len(self.clients)

    @property
    def table(self) -> str:
        """A line per client and one for all, and what `skew` says."""
        label, documents = ("label", "examples") if self.labelled else ("group", "documents")
        lines = [("client", documents, "bytes", "share", f"{label}s", f"largest {label}s")]
        for holding in (*self.clients, self.everybody):
            largest = list(holding.shares.items())[:LARGEST]
            lines.append(
                (
                    holding.client,
                    f"{holding.documents:,}",
                    f"{holding.bytes:,}",
                    f"{holding.bytes / self.everybody.bytes:.1%}",
                    f"{len(holding.labels)}",
                    ", ".join(f"{_short(name)} {share:.0%}" for name, share in largest),
                )
            )
        skew = f"skew {self.skew:.3f}: how unlike all together a client is, from 0 to 1"
        return f"{table_text(lines, right=range(1, 5))}\n{skew}"

    @property
    def json(self) -> str:
        """Everything that is counted, for other programs."""
        told = {
            "skew": self.skew,
            "unit": "examples" if self.labelled else "bytes",
            "all": asdict(self.everybody),
            "clients": [asdict(client) for client in self.clients],
        }
        return json.dumps(told, indent=2) + "\n"

    def plot(self, file: Path, title: str) -> None:
        """Draw a bar per client, of its labels: the largest have a color, all others are white."""
        names = [str(number) for number in range(len(self.clients))]
        colored = list(self.everybody.labels)[:COLORED]
        figure = Figure(figsize=(max(7.0, 2.5 + 0.3 * len(names)), 4.5), layout="constrained")
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
    """A label in one line of at most 24 characters."""
    plain = "".join(c if c.isprintable() else " " for c in label)
    return plain if len(plain) <= 24 else f"{plain[:21]}..."


def _in_legend(label: str) -> str:
    """A label as a legend takes it: no formula, and not hidden by an underscore in front."""
    return " " + _short(label).replace("$", r"\$")
