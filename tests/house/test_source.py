"""Rules about the source that must stay true: no pickle, no eval, short files, plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import FILES, require_none, text, tree

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
NO_CODE = {"GenerationConfig", "PeftModel", "cls"}  # read a file without code of the checkpoint's
UNPICKLES = {("simulations/bench/naive.py", "pickle")}  # what ours is measured against
MAX_FILE, MAX_FUNCTION = 400, 60
DOORS = {  # they answer a caller who is somewhere else, or end a program
    "fedsplit/cli/__init__.py",
    "fedsplit/config/commandline.py",
    "fedsplit/console.py",
    "fedsplit/flower/inline.py",
    "fedsplit/flower/strategy/tracker.py",
    "fedsplit/flower/withheld.py",
    "fedsplit/openai/app.py",
    "fedsplit/transport/calls.py",
    "fedsplit/telemetry/sinks.py",
    "fedsplit/trunk/engine.py",
    "simulations/fuzzing/campaign.py",
    "simulations/schedules/turns.py",
    "simulations/sweep.py",
}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file, with the file."""
    return ((file, node) for file in FILES for node in ast.walk(tree(file)))


def lines() -> Iterator[tuple[str, str]]:
    """Every line of every file, with "file:line"."""
    for file in FILES:
        for number, line in enumerate(text(file).splitlines(), start=1):
            yield f"{file}:{number}", line


def test_a_broken_rule_names_every_offender():
    with pytest.raises(AssertionError, match=r"2 found; remove it\na.py:1: x\nb.py:7: y"):
        require_none(["a.py:1: x", "b.py:7: y"], "remove it")


def banned(code: ast.AST) -> Iterator[str]:
    """The names by which a node of code unpickles or evaluates data."""
    match code:
        case ast.Import(names=names):
            yield from (n.name for n in names if n.name.partition(".")[0] in PICKLES)
        case ast.ImportFrom(module=str(name)) if name.partition(".")[0] in PICKLES:
            yield name
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield name
        case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
            yield f"torch.{code.attr}"
        case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=value):
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield code.arg


def banned_in(source: str) -> list[str]:
    return [name for node in ast.walk(ast.parse(source)) for name in banned(node)]


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
    assert banned_in(code)


@pytest.mark.parametrize("code", ["model.eval()", "f(trust_remote_code=False)", "re.compile(x)"])
def test_the_search_lets_pass(code):
    assert not banned_in(code)


def test_nothing_is_unpickled_or_evaluated():
    found = [(file, node, name) for file, node in nodes() for name in banned(node)]
    require_none(
        (
            f"{file}:{node.lineno}: {name}"
            for file, node, name in found
            if (file, name) not in UNPICKLES
        ),
        "read safetensors, JSON or protobuf instead",
    )
    unused = UNPICKLES - {(file, name) for file, _, name in found}
    require_none((f"{file}: {name}" for file, name in unused), "remove it from UNPICKLES")


def asks(code: ast.AST) -> bool:
    """Whether a node reads a checkpoint and may ask if it should run the checkpoint's own code."""
    match code:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=method)):
            reads = method == "from_pretrained" or (method, owner[:4]) == ("from_config", "Auto")
            kept = any(each.arg == "trust_remote_code" for each in code.keywords)
            return reads and not kept and owner not in NO_CODE
    return False


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("AutoTokenizer.from_pretrained(x, revision=y)", True),
        ("AutoModel.from_config(x)", True),
        ("LlamaForCausalLM.from_pretrained(x)", True),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", False),
        ("GenerationConfig.from_pretrained(x)", False),
    ],
)
def test_the_search_finds_what_asks(code, found):
    assert any(map(asks, ast.walk(ast.parse(code)))) is found


def test_nobody_is_asked_to_run_a_checkpoint_s_code():
    require_none(
        (f"{file}:{node.lineno}" for file, node in nodes() if asks(node)),
        "pass trust_remote_code=False, or transformers asks on the terminal",
    )


def test_what_unpickles_is_for_a_bench_only():
    readers = {file for file in FILES for name, _ in UNPICKLES if _imports(file, name)}
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


def test_a_file_says_first_what_it_owns():
    require_none(
        (f"{file}:1: no docstring" for file in FILES if not ast.get_docstring(tree(file))),
        "begin the file with a docstring that says what it owns",
    )


def test_files_are_short():
    lengths = {file: text(file).count("\n") for file in FILES}
    require_none(
        (f"{file}: {length} lines" for file, length in lengths.items() if length > MAX_FILE),
        f"divide a file of more than {MAX_FILE} lines by its nouns",
    )


def test_functions_are_short():
    functions = (
        (file, node, (node.end_lineno or 0) - node.lineno + 1)
        for file, node in nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    require_none(
        (
            f"{file}:{node.lineno}: {node.name} has {length} lines"
            for file, node, length in functions
            if length > MAX_FUNCTION
        ),
        f"divide a function of more than {MAX_FUNCTION} lines",
    )


def test_code_is_plain_ascii():
    require_none(
        (f"{place}: {line.strip()}" for place, line in lines() if not line.isascii()),
        "write an escape or a word instead",
    )


def test_nothing_is_left_for_later():
    later = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    require_none(
        (f"{place}: {line.strip()}" for place, line in lines() if later.search(line)),
        "do it, or file an issue",
    )


def test_every_error_is_used_outside_its_file():
    errors = "fedsplit/errors.py"
    defined = {node.name for node in tree(errors).body if isinstance(node, ast.ClassDef)}
    others = [node for file in FILES if file != errors for node in ast.walk(tree(file))]
    names = {node.id for node in others if isinstance(node, ast.Name)}
    names |= {node.attr for node in others if isinstance(node, ast.Attribute)}  # errors.TlsFailed
    require_none(
        (f"{errors}: {name} is raised and caught nowhere" for name in sorted(defined - names)),
        "remove the class",
    )


def test_a_broad_except_is_at_a_door_only():
    require_none(
        (
            f"{file}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
            for file, node in nodes()
            if isinstance(node, ast.ExceptHandler) and swallows_all(node) and file not in DOORS
        ),
        "name the exceptions, or raise again",
    )


def swallows_all(handler: ast.ExceptHandler) -> bool:
    named = ast.unparse(handler.type) if handler.type else "BaseException"
    again = any(isinstance(n, ast.Raise) and n.exc is None for n in handler.body)
    return named in ("Exception", "BaseException") and not again


SECRET = ("fedsplit/client/privacy.py", "fedsplit/client/keys.py", "fedsplit/client/seal.py")
"""Where noise and pads are made. The server knows the seed of a run, so they must not know it."""


@pytest.mark.parametrize("file", SECRET)
def test_what_is_secret_does_not_come_from_a_seed(file: str):
    found = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Name | ast.Attribute)]
    names = [(node, node.id if isinstance(node, ast.Name) else node.attr) for node in found]
    require_none(
        (
            f"{file}:{node.lineno}: {name}"
            for node, name in names
            if "seed" in name.lower() or name == "RunSpec"
        ),
        "make it of the key",
    )
    assert names
