"""Writes the list of files and the figures of the code into fedsplit/README.md.

    python -m simulations.figures           # print both
    python -m simulations.figures --write   # write them between the markers of fedsplit/README.md
    python -m simulations.figures --hops    # list the hops of a training forward, in their order

A test of the suite checks that fedsplit/README.md is up to date.
"""

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fedsplit.console import quiet_libraries
from simulations.hops import forward_functions, forward_hops

ROOT = Path(__file__).parents[1]
MAP = ROOT / "fedsplit" / "README.md"
PACKAGES = ("fedsplit", "strategies", "simulations")

OPTIONS = (
    "autocast",
    "clients_per_pass",
    "history_bytes",
    "kv",
    "label_smoothing",
    "micro_batches",
    "sim_slowdown",
    "task",
    "trunk_steps",
)
"""Options of a run or of a client that reach into several packages."""


def main() -> None:
    """Print the list and the figures, or write them to fedsplit/README.md."""
    parser = argparse.ArgumentParser(prog="python -m simulations.figures")
    parser.add_argument("--write", action="store_true", help=f"write {MAP.relative_to(ROOT)}")
    parser.add_argument("--hops", action="store_true", help="list the hops of a training forward")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.hops:
        _print_hops()
    elif arguments.write:
        MAP.write_text(up_to_date(MAP.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(f"{files()}\n{figures()}", end="")


def up_to_date(text: str) -> str:
    """Return the text of fedsplit/README.md with the current files and figures."""
    for name, content in (("files", files()), ("figures", figures())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        if end not in rest:
            raise SystemExit(f"{MAP} has no {begin.strip()} that is followed by {end}")
        text = f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def files() -> str:
    """Return a code block of all modules, as a tree, with the first lines of their docstrings."""
    lines = [line for package in PACKAGES for line in _tree(ROOT / package, 0)]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(
        ["```text", *(f"{name:{width}}{summary}".rstrip() for name, summary in lines), "```", ""]
    )


def figures() -> str:
    """Return the figures as two tables: sizes by package, and counts of the whole code."""
    lines = ["| | " + " | ".join(f"`{package}`" for package in PACKAGES) + " |"]
    lines += ["|---|" + "---|" * len(PACKAGES)]
    columns = [_sizes(package) for package in PACKAGES]
    lines += [f"| {name} | " + " | ".join(c[name] for c in columns) + " |" for name in columns[0]]
    modules = [f for f in (ROOT / "fedsplit").glob("*.py") if f.name != "__init__.py"]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| modules of `fedsplit` besides its folders | {len(modules)} |",
        f"| hops of a training forward (`simulations/hops.py`) | {len(forward_hops())} |",
        *(f"| files that name `{option}` | {_files_that_name(option)} |" for option in OPTIONS),
        "",
    ]
    return "\n".join(lines)


def _tree(folder: Path, depth: int) -> Iterator[tuple[str, str]]:
    yield f"{'  ' * depth}{folder.name}/", _summary(folder / "__init__.py")
    inside = "  " * (depth + 1)
    for file in _modules(folder):
        if file.parent == folder and file.name != "__init__.py":
            yield f"{inside}{file.name}", _summary(file)
    for package in sorted(each.parent for each in folder.glob("*/__init__.py")):
        yield from _tree(package, depth + 1)


def _summary(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def _modules(folder: Path) -> list[Path]:
    # Code that protoc generates is not ours to keep short.
    return sorted(file for file in folder.rglob("*.py") if "_pb2" not in file.name)


def _sizes(package: str) -> dict[str, str]:
    texts = [file.read_text(encoding="utf-8") for file in _modules(ROOT / package)]
    lines = [text.count("\n") for text in texts]
    functions = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {
        "files": f"{len(texts)}",
        "lines of a file, median": f"{statistics.median(lines):.0f}",
        "lines of a file, largest": f"{max(lines)}",
        "functions": f"{len(functions)}",
        "lines of a function, median": f"{statistics.median(functions):.0f}",
        "lines of a function, 90 % at most": f"{functions[len(functions) * 9 // 10]}",
        "lines of a function, largest": f"{functions[-1]}",
    }


def _files_that_name(option: str) -> int:
    """Return the number of files with this identifier in Python's code or as a key in conf/."""
    code = [file for package in PACKAGES for file in _modules(ROOT / package)]
    conf = [file for folder in ("conf", "fedsplit") for file in (ROOT / folder).rglob("*.yaml")]
    return sum(option in _identifiers(file) for file in code) + sum(
        re.search(rf"\b{option}\b\s*[:=]", file.read_text(encoding="utf-8")) is not None
        for file in conf
    )


@cache
def _identifiers(file: Path) -> frozenset[str]:
    # Tokens, because the word in a comment or docstring does not count.
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return frozenset(token.string for token in tokens if token.type == tokenize.NAME)


def _print_hops() -> None:
    number = 0
    for function, is_hop in forward_functions().items():
        number += is_hop
        print(f"{number:3}  {function}" if is_hop else f"     {function}  (helper)")
    print(f"{number} hops of a training forward")


if __name__ == "__main__":
    main()
