"""What fedsplit's programs share at a terminal: aligned tables, quiet libraries, a quiet end.

Libraries are imported by the function that needs them, so that a program's `--help` is quick.
"""

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

READER_GONE = 141
"""The exit status of a program whose output nobody reads any more: of SIGPIPE, in a shell."""

_ANY_WIDTH = 1 << 20
"""Columns of a terminal on which every row is one line."""


def table_text(rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows as lines of aligned columns, which are never wrapped, cut or colored.

    >>> print(table_text([("client", "bytes"), ("client-0", "1,024")], right=[1]))
    client    bytes
    client-0  1,024

    Args:
        rows: The cells of each line, one for each column.
        right: The columns whose cells are aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[Text(cell) for cell in row] for row in rows]  # Text: no markup in what is printed
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(lines[0]) if lines else 0):
        table.add_column(justify="right" if column in right else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(color_system=None, width=_ANY_WIDTH)
    with console.capture() as printed:
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


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
