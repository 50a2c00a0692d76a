"""The text of tokens that arrive one by one: whole characters, and stop strings across tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

INCOMPLETE = "\ufffd"
"""Ends the text of tokens whose last character is not complete."""


class TextDecoder:
    """Decodes tokens one by one; all its pieces are the text of all tokens.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Some tokenizers write a token after others in another way than alone. So tokens are
        # decoded with those of the piece before, from `_first` on; `_next` is the first new one.
        self._first = self._next = 0

    def push(self, token: int) -> str:
        """Return the text that a token completes; empty within a character."""
        self._ids.append(token)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return ""
        self._first, self._next = self._next, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """Return what is left at the end: characters that stay incomplete."""
        before, now = self._texts()
        self._first, self._next = self._next, len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """The text of the piece before, without and with the tokens after it."""
        return self._decoded(self._ids[self._first : self._next]), self._decoded(
            self._ids[self._first :]
        )

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str), "one sequence has one text"
        return text


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    Args:
        stops: The strings; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return the text that no stop string can begin in any more, and whether one was found.

        The text ends before the stop string.

        >>> stops = StopStrings(["END"])
        >>> [stops.push(piece) for piece in ("a E", "N", "x EN", "D b")]
        [('a ', False), ('', False), ('ENx ', False), ('', True)]
        """
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        kept = max((_begun(text, stop) for stop in self._stops), default=0)
        cut = len(text) - kept
        self._held = text[cut:]
        return text[:cut], False

    def rest(self) -> str:
        """Return what was held back, once no more text follows."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string.

    >>> _begun("a EN", "END")
    2
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
