"""How fedsplit's programs show themselves on a terminal: their own words, not their libraries'."""

from transformers.utils import logging


def quiet_libraries() -> None:
    """Turn off progress bars and advice of transformers; its errors are still raised."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
