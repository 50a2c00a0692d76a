"""Tables as text: aligned, whole, and nothing but what is in their cells."""

from fedsplit.console import table_text

ROWS = [("client", "bytes", "labels"), ("client-0", "1,024", "[red] b"), ("all", "2", "")]


def test_columns_are_aligned_to_either_side():
    assert table_text(ROWS, right=[1]).split("\n") == [
        "client    bytes  labels",
        "client-0  1,024  [red] b",
        "all           2",
    ]


def test_a_row_is_one_line_however_narrow_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert table_text([("name", "x" * 500), ("n", "y")]) == f"name  {'x' * 500}\nn     y"


def test_no_rows_are_no_text():
    assert table_text([]) == ""
