"""The path of the folder `conf/`, with the YAML files that a run is composed of."""

from pathlib import Path

import fedsplit

_PACKAGE = Path(fedsplit.__file__).resolve().parent


def conf_dir() -> Path:
    """Return the folder that has `config.yaml` and one folder for each group of options.

    In a wheel it is inside the package. In a checkout, and in the bundle that Flower makes of a
    checkout, it is beside the package.
    """
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"
