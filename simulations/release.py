"""Builds the sdist and the wheel, and uses both in clean environments of several Pythons.

    python -m simulations.release                    # Python 3.11, and 3.12 and 3.13 where present
    python -m simulations.release --python 3.12

Each environment is made in a temporary folder, outside the checkout. There, the sdist is installed
with what it needs, then the wheel. With each version of Flower, a toy run is trained in a process
and under Flower, with equal losses, and so is a run with a SuperLink and SuperNodes, by its test.
The last toy run is served and generated from.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PYTHONS = ("3.11", "3.12", "3.13")
FLOWERS = ("1.41", "1.42")
PACKAGES = {"fedsplit", "strategies"}
"""What the wheel adds to an environment."""
_DEPLOYED = "tests/edge/test_deployed.py::test_a_superlink_and_two_supernodes_train_over_tls"
"""The test of a deployment, whose second SuperNode has a data-path alone."""
_STOP_S = 60.0
"""Seconds that the server may take to end."""

_FILES = """
from importlib.metadata import files
print(*{path.parts[0] for path in files("fedsplit") if path.parts[0] != ".."})
"""
_TRAIN = """
import sys
from fedsplit.config import compose, to_yaml
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import run_inline

if __name__ == "__main__":
    run = compose(["experiment=toy", f"name={sys.argv[1]}"])
    config = {"config": to_yaml(run), "run-dir": run.launch.run_dir}
    run_inline(server_app.app, client_app.app, num_clients=run.num_nodes, run_config=config)
"""


def main() -> None:
    """Build the distributions, and check them with each Python.

    Raises:
        SystemExit: A check failed, or a Python that was asked for is not there.
    """
    parser = argparse.ArgumentParser(prog="python -m simulations.release")
    parser.add_argument("--python", action="append", metavar="3.X", help="only this one")
    asked = parser.parse_args().python
    sdist, wheel = build(DIST)
    for version in asked or PYTHONS:
        if python := interpreter(version):
            check(python, sdist, wheel)
            print(f"Python {version}: ok", flush=True)
        elif asked:
            raise SystemExit(f"error: there is no python{version} on the PATH; install it")
        else:
            print(f"Python {version}: not on the PATH, skipped", flush=True)


def interpreter(version: str) -> Path | None:
    """Return the interpreter of a version of Python; None if the PATH has none that starts."""
    command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    # A shim of pyenv is on the PATH for each version, and starts the one that the variable names.
    environment = {**os.environ, "PYENV_VERSION": version}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def build(target: Path) -> tuple[Path, Path]:
    """Build the sdist of the checkout, and the wheel from the sdist.

    Args:
        target: The folder for both; distributions that are there are removed.

    Returns:
        The sdist and the wheel.

    Raises:
        SystemExit: They cannot be built.
    """
    target.mkdir(exist_ok=True)
    for old in (*target.glob("*.tar.gz"), *target.glob("*.whl")):
        old.unlink()
    _call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)])
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    print(f"built {sdist.name} and {wheel.name}", flush=True)
    return sdist, wheel


def check(python: Path, sdist: Path, wheel: Path) -> None:
    """Install both distributions in a new environment, and train, serve and generate with them.

    Args:
        python: The interpreter of the environment.
        sdist: The sdist; its dependencies are those of constraints.txt.
        wheel: The wheel, which takes its place.

    Raises:
        SystemExit: A step failed; the text has the end of its output.
    """
    with TemporaryDirectory(prefix="fedsplit-release-") as name:
        place = Path(name)
        _call([str(python), "-m", "venv", str(place / "env")])
        own = str(place / "env" / "bin" / "python")
        pip = [own, "-m", "pip", "install", "--quiet"]
        _call([*pip, "-c", str(ROOT / "constraints.txt"), str(sdist)], place)
        _call([own, "-m", "fedsplit", "--version"], place)
        _call([*pip, "--no-deps", "--force-reinstall", str(wheel)], place)
        _call([own, "-m", "pip", "check"], place)
        _require_packages(_call([own, "-c", _FILES], place), wheel)
        _call([*pip, "-c", str(ROOT / "constraints.txt"), "pytest", "hypothesis"], place)
        shutil.unpack_archive(sdist, place)
        app = place / sdist.name.removesuffix(".tar.gz")
        (place / "train.py").write_text(_TRAIN, encoding="utf-8")
        losses = set()
        for flower in FLOWERS:
            _call([*pip, f"flwr[simulation]=={flower}.*"], place)
            losses |= _train(own, place, app, flower.replace(".", "-"))
            _call([own, "-m", "pytest", "-q", _DEPLOYED], app)
        if len(losses) > 1:
            raise SystemExit(f"error: the losses differ: {', '.join(map(str, losses))}")
        _serve(place / "env" / "bin" / "fedsplit", place, f"runs/{FLOWERS[-1].replace('.', '-')}")


def _require_packages(printed: str, wheel: Path) -> None:
    """Refuse a wheel with other packages at the top than `PACKAGES`."""
    found = {name for name in printed.split() if not name.endswith(".dist-info")}
    if found != PACKAGES:
        raise SystemExit(
            f"error: {wheel.name} installs {', '.join(sorted(found))}, and should install "
            f"{', '.join(sorted(PACKAGES))}; correct [tool.hatch.build.targets.wheel]"
        )


def _train(python: str, place: Path, app: Path, name: str) -> set[tuple[float, ...]]:
    """Train a toy run in one process, and one under Flower; return the losses of their rounds.

    Args:
        python: The interpreter of the environment.
        place: The folder of the runs.
        app: The unpacked sdist, which is the Flower app.
        name: The name of the first run.
    """
    _call([python, "train.py", name], place)
    under = f"{name}-flwr"
    words = ["experiment=toy", "launch=flwr", f"name={under}", f"launch.run_dir={place / 'runs'}"]
    # A machine that builds releases may be busy.
    words += ["launch.start_timeout_s=900", "policy.deadline_s=900"]
    _call([python, "-m", "simulations.run", *words], app)
    files = [place / "runs" / each / "metrics.jsonl" for each in (name, under)]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return {tuple(json.loads(line)["loss"] for line in text.splitlines()) for text in texts}


def _serve(command: Path, place: Path, run: str) -> None:
    """Serve a run, and generate with it."""
    generate = [str(command), "generate", "--run", run, "--max-new-tokens", "4", "The"]
    with _serving([str(command), "serve", run], place):
        text = _call(generate, place)
    if not text.strip():
        raise SystemExit("error: fedsplit generate printed nothing")


@contextmanager
def _serving(command: Sequence[str], place: Path) -> Iterator[None]:
    """A trunk server that is ready, and is stopped after the block.

    Raises:
        SystemExit: It did not start, or did not end as it should.
    """
    with subprocess.Popen(
        command, cwd=place, env=_environment(), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout, "it is a pipe"
        try:
            # The line comes when the server is ready; without a server, the pipe is closed.
            if "serving" not in server.stdout.readline():
                raise SystemExit(f"error: {' '.join(command)} did not start; its error is above")
            yield
        finally:
            server.terminate()
            status = server.wait(_STOP_S)
    if status:
        raise SystemExit(f"error: {' '.join(command)} ended with status {status} at SIGTERM")


def _call(command: Sequence[str], place: Path = ROOT) -> str:
    """Run a command in a folder; return what it printed.

    Raises:
        SystemExit: It failed.
    """
    print("$", *(word if "\n" not in word else "..." for word in command), flush=True)
    done = subprocess.run(
        command,
        cwd=place,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"error: {command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        )
    return done.stdout


def _environment() -> dict[str, str]:
    """Return the environment without what would add the checkout to the path of Python."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYENV_VERSION")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    # The losses are compared to the last bit, and a sum depends on the number of threads. Ray gives
    # its processes one, and a library may use fewer than there are on a busy machine.
    return {**kept, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
