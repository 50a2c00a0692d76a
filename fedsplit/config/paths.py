"""The local paths of a run: made absolute, since other processes work in other folders."""

from dataclasses import replace
from pathlib import Path

from fedsplit.spec import RunSpec


def with_absolute_paths(run: RunSpec, folder: Path) -> RunSpec:
    """Return the run with absolute paths of its model, data, TLS files, traces and resumed run.

    A model or a data set that is not there stays as it is, because it may be a hub id. So does
    `launch.run_dir`: the process that the paths are relative to makes the run's folder.

    Args:
        run: The run.
        folder: The folder to which its paths are relative.
    """

    def file(path: str) -> str:
        absolute = folder / path
        # Links stay where possible, since their targets are names that the user does not know.
        return str(absolute.resolve() if ".." in absolute.parts else absolute) if path else ""

    def name(path: str) -> str:
        # A data set of the hub may have a configuration after a colon.
        local = path.partition(":")[0]
        is_local = path.startswith(("./", "../")) or (folder / local).exists()
        return file(path) if is_local else path

    wire, data = run.wire, run.data
    return replace(
        run,
        launch=replace(run.launch, traces=file(run.launch.traces)),
        privacy=replace(run.privacy, public=file(run.privacy.public)),
        resume=run.resume if run.resume == "auto" else file(run.resume),
        model=replace(run.model, pretrained=name(run.model.pretrained)),
        data=replace(data, path=name(data.path) if data.kind == "hub" else file(data.path)),
        wire=replace(
            wire,
            tls_cert=file(wire.tls_cert),
            tls_key=file(wire.tls_key),
            tls_ca=file(wire.tls_ca),
        ),
    )
