"""The peers' test suites, from the source distributions of the installed versions."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


def download(package: str, folder: Path) -> Path:
    """Unpack the source distribution of the installed version of a package from PyPI.

    Args:
        package: The name of the package.
        folder: Where to put it.

    Returns:
        The distribution's folder.
    """
    source = f"{package}-{version(package)}"
    # A build backend is not needed, as nothing is built.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    _pip("download", *options, "--dest", str(folder), source.replace("-", "==", 1))
    with tarfile.open(folder / f"{source}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / source


def install(package: str, folder: Path) -> None:
    """Install a package that only the suites need into a folder, without dependencies."""
    _pip("install", "--quiet", "--no-deps", "--target", str(folder), package)


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
