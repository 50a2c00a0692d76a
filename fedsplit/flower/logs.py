"""The log in a process of Flower: where Flower's own lines go, and in the same format."""

import os
from typing import TextIO

from flwr.common.logger import FLOWER_LOGGER, ConsoleHandler, console_handler

from fedsplit.console import FORMAT_VARIABLE, begin_log
from fedsplit.telemetry.logs import json_handler


class _Console(ConsoleHandler):
    """Writes as Flower's handler does, which changes its stream; its level is another one."""

    def __init__(self) -> None:
        super().__init__(timestamps=console_handler.timestamps, colored=console_handler.colored)

    @property
    def stream(self) -> TextIO:
        stream: TextIO = console_handler.stream
        return stream

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def show_logs() -> None:
    """Write the log of fedsplit as Flower writes its own, unless the program has said where.

    With the format json, Flower's lines are JSON as well.

    Raises:
        ConfigError: The environment names an unknown format or level.
    """
    begin_log("info", handler=_Console())
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    if is_json and console_handler in FLOWER_LOGGER.handlers:
        FLOWER_LOGGER.removeHandler(console_handler)
        FLOWER_LOGGER.addHandler(json_handler(console_handler.level))
        # The handler of other libraries' lines would write them again.
        FLOWER_LOGGER.propagate = False
