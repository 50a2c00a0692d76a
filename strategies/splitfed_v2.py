"""SplitFed V2: one trunk that all clients train together, and halves that are averaged.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI 36(8), arXiv 2004.12088, section 3.4 (SFLV2): the server side is one model; the
client sides are aggregated after each round. There the server takes the clients one after the
other in random order; here it takes them as the run's policy says. The halves are the business
of any Flower strategy, FedAvg by default.
"""

from fedsplit.flower.strategy import SplitStrategy


class SplitFedV2(SplitStrategy):
    """The base as it is."""
