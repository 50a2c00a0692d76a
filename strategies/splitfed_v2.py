"""SplitFed V2: one trunk that all clients train together, and client weights that are averaged.

Thapa, Mahawaga Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI 36(8), arXiv 2004.12088, section 3.4 (SFLV2): the server side is one model; the
client sides are aggregated after each round. There the server takes the clients one after the
other in random order; here the run's policy decides when the trunk steps, and a step uses the mean
of the clients' gradients, weighted by tokens (`TrunkUpdate.combine`). Any Flower strategy
aggregates the client weights, FedAvg by default.
"""

from fedsplit.flower.strategy import SplitStrategy


class SplitFedV2(SplitStrategy):
    """`SplitStrategy` without changes."""
