"""Checks of versions: of Python and packages here, and of the servers'."""

from collections.abc import Mapping, Sequence
from importlib.metadata import metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from fedsplit.config.location import conf_dir
from fedsplit.doctor.result import Result, fail, ok, skipped, warn

Versions = Mapping[str, str]

_INSTALL = "pip install -c constraints.txt with the constraints.txt of this version of fedsplit"


def python_required() -> str:
    """Return the versions of Python that fedsplit needs, as its metadata says."""
    return metadata("fedsplit")["Requires-Python"]


def packages_required() -> list[Requirement]:
    """Return the packages that fedsplit needs, without those of its extras."""
    needed = map(Requirement, requires("fedsplit") or ())
    return [each for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]


def versions_tested() -> Versions:
    """Return the versions that fedsplit is tested with, by package; empty if they are not here."""
    file = conf_dir().with_name("constraints.txt")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in pins}


def check_python(python: str, required: str) -> Result:
    """Check the version of Python."""
    if python in SpecifierSet(required, prereleases=True):
        return ok("python", f"{python} is {required}")
    return fail(
        "python",
        f"{python} is not {required}",
        "install a newer Python, and fedsplit with it",
    )


def check_packages(installed: Versions, required: Sequence[Requirement]) -> Result:
    """Check that the packages that fedsplit needs are installed, in versions that it works with."""
    wrong = []
    for each in required:
        found = installed.get(canonicalize_name(each.name))
        if found is None:
            wrong.append(f"{each.name} is not installed")
        elif not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each.name} {found} is not {each.specifier}")
    if wrong:
        return fail("packages", "; ".join(wrong), _INSTALL)
    return ok("packages", f"{len(required)} packages are as fedsplit needs them")


def check_tested(installed: Versions, required: Sequence[Requirement], tested: Versions) -> Result:
    """Check that packages have the versions that fedsplit is tested with."""
    if not tested:
        return skipped("tested versions", "there is no constraints.txt with fedsplit")
    names = [name for each in required if (name := canonicalize_name(each.name)) in tested]
    other = [
        f"{name} {installed[name]} (tested: {tested[name]})"
        for name in names
        if name in installed and _public(installed[name]) != tested[name]
    ]
    if other:
        return warn("tested versions", "; ".join(other), _INSTALL)
    return ok("tested versions", f"{len(names)} packages have the versions that are tested")


def check_peer(name: str, ours: Versions, theirs: Versions) -> Result:
    """Check that a trunk's server has the same versions of what computes."""
    name = f"{name} versions"
    if not theirs:
        return skipped(name, "a server tells its versions with a valid token only")
    differ = [
        f"{each} is {ours[each]} here and {there} at the server"
        for each, there in theirs.items()
        if each in ours and _public(ours[each]) != _public(there)
    ]
    if any(text.startswith("fedsplit ") for text in differ):
        return fail(name, "; ".join(differ), "install the same version of fedsplit at both sides")
    if differ:
        return warn(name, "; ".join(differ), "install the same; results may differ in last digits")
    return ok(name, f"fedsplit {theirs.get('fedsplit')} and its packages are the same there")


def check_flower(ours: str, theirs: str) -> Result:
    """Check that a SuperLink has the same minor version of Flower, as Flower requires."""
    name = "superlink versions"
    try:
        here, there = Version(ours).release[:2], Version(theirs).release[:2]
    except InvalidVersion:
        return skipped(name, "the SuperLink tells no version of Flower")
    if here != there:
        return fail(
            name,
            f"Flower is {ours} here and {theirs} at the SuperLink",
            "install the same minor version of flwr at both sides; the SuperLink refuses others",
        )
    return ok(name, f"Flower is {theirs} at the SuperLink and {ours} here")


def _public(version: str) -> str:
    # A local label names a build, such as +cpu.
    return version.partition("+")[0]
