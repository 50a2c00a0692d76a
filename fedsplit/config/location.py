"""The folder `conf/`: where the YAML files that a run is composed of are."""

from pathlib import Path

import fedsplit

_PACKAGE = Path(fedsplit.__file__).resolve().parent


def conf_dir() -> Path:
    """The folder with `config.yaml` and one folder for each group of options.

    A wheel has it inside the package. A checkout, and the bundle that Flower makes of one, have it
    beside the package.
    """
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"
