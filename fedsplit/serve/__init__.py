"""The trunk server without Flower, and its clients."""

from fedsplit.serve.client import Reached, reach, remote_model
from fedsplit.serve.shared import ADDRESS
from fedsplit.serve.state_folder import StateFolder
from fedsplit.serve.trunk_server import Served, hosted, plain_name, plan, trunks_of
from fedsplit.serve.trunk_states import TrunkStates

__all__ = [
    "ADDRESS",
    "Reached",
    "Served",
    "StateFolder",
    "TrunkStates",
    "hosted",
    "plain_name",
    "plan",
    "reach",
    "remote_model",
    "trunks_of",
]
