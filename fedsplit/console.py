"""Terminal output of fedsplit's programs: aligned tables, quiet libraries, closed pipes, errors.

Functions import the libraries that they need, so that a program's `--help` is fast.
"""

import logging
import os
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fedsplit.errors import error_text, one_line
from fedsplit.telemetry.logs import configure

FORMAT_VARIABLE, LEVEL_VARIABLE = "FEDSPLIT_LOG_FORMAT", "FEDSPLIT_LOG_LEVEL"
"""The variables of the environment with the format and the level of the log."""

READER_GONE = 141
"""The exit status after the reader of the output has closed it: 128 + SIGPIPE, as in a shell."""

# rich wraps or cuts rows at the terminal's width, and scripts read the tables.
_ANY_WIDTH = 1 << 20


def table_text(rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lines of aligned columns, which are never wrapped, cut or colored.

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

    # As Text, so that rich does not read "[...]" in a cell as markup.
    lines = [[Text(cell) for cell in row] for row in rows]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(lines[0]) if lines else 0):
        table.add_column(justify="right" if column in right else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(color_system=None, width=_ANY_WIDTH)
    with console.capture() as printed:
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def begin_log(
    default_level: str,
    *,
    form: str = "",
    level: str = "",
    handler: logging.Handler | None = None,
) -> None:
    """Write the log as the options of a program say, or the environment where they are empty.

    Processes that the program starts do so as well: Flower's have no options of ours.

    Args:
        default_level: The level, if nothing names one.
        form: The format, text or json.
        level: The level.
        handler: As for `fedsplit.telemetry.logs.configure`.

    Raises:
        ConfigError: There is no such format or level.
    """
    for variable, value in ((FORMAT_VARIABLE, form), (LEVEL_VARIABLE, level)):
        if value:
            os.environ[variable] = value
    found = os.environ.get(FORMAT_VARIABLE) or "text"
    configure(found, os.environ.get(LEVEL_VARIABLE) or default_level, handler)


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of libraries; their errors are still raised."""
    # It warns at every pass of an int8 layer, and of a package that it would like at its import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """A context that ends the program silently if its output is closed, as by `| head`.

    Raises:
        SystemExit: The output is closed; the status is `READER_GONE`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout at its exit, which would print a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)


def print_error(error: Exception, *, debug: bool, subject: str = "") -> None:
    """Print an error as one line on stderr.

    Args:
        error: The error.
        debug: Whether to print its traceback first.
        subject: What failed, if it is not the program.
    """
    if debug:
        traceback.print_exception(error)
    text = one_line(error_text(error))
    print("error:", f"{subject}: {text}" if subject else text, file=sys.stderr, flush=True)


@contextmanager
def ending_with_an_error_line(*, debug: bool) -> Iterator[None]:
    """A context that ends the program with status 1 and the text of an error on stderr.

    Args:
        debug: Whether to print the traceback too.

    Raises:
        SystemExit: In place of the error.
    """
    try:
        yield
    except Exception as exc:
        print_error(exc, debug=debug)
        sys.exit(1)
