"""Tables are aligned, whole, and nothing but what is in their cells; errors are one line."""

from fedsplit.console import print_error, table_text

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


def test_an_error_is_one_line_that_names_what_failed(capsys):
    error = RuntimeError("no room:\n  2 of 3 tensors")
    print_error(error, debug=False, subject="job 1 (seed=2)")
    told = "RuntimeError: no room: 2 of 3 tensors (--debug shows the traceback)"
    assert capsys.readouterr().err == f"error: job 1 (seed=2): {told}\n"
