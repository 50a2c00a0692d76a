"""Rules about the source that must stay true: no pickle, no eval, short files, plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import FILES, text, tree

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"simulations/bench/naive.py": ["pickle"]}  # what ours is measured against
MAX_FILE, MAX_FUNCTION = 400, 60
DOORS = {  # they answer a caller who is somewhere else
    "fedsplit/flower/inline.py",
    "fedsplit/transport/server.py",
    "fedsplit/trunk/engine.py",
}

files = pytest.mark.parametrize("file", FILES)


def banned(code: ast.AST) -> Iterator[str]:
    """Where code runs, or unpickles, what somebody else wrote."""
    for node in ast.walk(code):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name.partition(".")[0] in PICKLES)
            case ast.ImportFrom(module=str(name)) if name.partition(".")[0] in PICKLES:
                yield name
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                yield f"torch.{node.attr}"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                continue
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield node.arg


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "eval(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds(code):
    assert list(banned(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "f(trust_remote_code=False)", "re.compile(x)"])
def test_the_search_lets_pass(code):
    assert not list(banned(ast.parse(code)))


@files
def test_nothing_is_unpickled_or_evaluated(file):
    assert list(banned(tree(file))) == UNPICKLES.get(file, [])


def test_what_unpickles_is_for_a_bench_only():
    readers = {file for file in FILES for name in UNPICKLES if _imports(file, name)}
    assert readers == {"simulations/bench/echo.py"}


def _imports(file: str, other: str) -> bool:
    package, name = Path(other).parent.as_posix().replace("/", "."), Path(other).stem
    return any(
        isinstance(node, ast.ImportFrom)
        and (
            node.module == f"{package}.{name}"
            or (node.module == package and name in [each.name for each in node.names])
        )
        for node in ast.walk(tree(file))
    )


@files
def test_a_file_says_first_what_it_owns(file):
    assert ast.get_docstring(tree(file))


@files
def test_files_and_functions_are_short(file):
    assert text(file).count("\n") <= MAX_FILE
    functions = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef))
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= MAX_FUNCTION]
    assert long == []


@files
def test_code_is_plain_ascii(file):
    assert text(file).isascii()


@files
def test_nothing_is_left_for_later(file):
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", text(file)) == []


def test_every_error_is_used_outside_its_file():
    errors = "fedsplit/errors.py"
    defined = {node.name for node in tree(errors).body if isinstance(node, ast.ClassDef)}
    others = [node for file in FILES if file != errors for node in ast.walk(tree(file))]
    names = {node.id for node in others if isinstance(node, ast.Name)}
    names |= {node.attr for node in others if isinstance(node, ast.Attribute)}  # errors.TlsFailed
    assert defined - names == set()


@files
def test_a_broad_except_is_at_a_door_only(file):
    handlers = (n for n in ast.walk(tree(file)) if isinstance(n, ast.ExceptHandler))
    assert file in DOORS or not [h.lineno for h in handlers if swallows_all(h)]


def swallows_all(handler: ast.ExceptHandler) -> bool:
    named = ast.unparse(handler.type) if handler.type else "BaseException"
    again = any(isinstance(n, ast.Raise) and n.exc is None for n in handler.body)
    return named in ("Exception", "BaseException") and not again
