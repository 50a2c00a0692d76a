"""How fedsplit's programs show themselves on a terminal: their own words, and a quiet end.

Libraries are imported by the function that needs them, so that a program's `--help` is quick.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READER_GONE = 141
"""The exit status of a program whose output nobody reads any more: of SIGPIPE, in a shell."""


def quiet_libraries() -> None:
    """Turn off progress bars and advice of transformers; its errors are still raised."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """A block that ends the program, without a word, once nobody reads it, as in `| head`.

    Raises:
        SystemExit: With `READER_GONE`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(READER_GONE)
