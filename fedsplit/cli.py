"""The `fedsplit` command: checkpoints cut and joined, trunks served, runs and shards drawn.

Libraries are imported by the command that needs them, so that `fedsplit --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedsplit import atomic
from fedsplit.cli_serving import add_commands
from fedsplit.console import ending_with_its_reader
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.spec import SplitSpec, WireSpec

_EXAMPLES = """\
examples:
  fedsplit split gpt2 --split 1/10/1 --out parts
  fedsplit join parts/bottom-top parts/trunk --out whole
  fedsplit serve --model gpt2 --split 1/10/1
  fedsplit generate --model gpt2 "Once upon a time"
  fedsplit info 127.0.0.1:9500
  fedsplit plot runs/default
  fedsplit compare runs/default runs/default-2 --out compared
  fedsplit shards sharding=dirichlet sharding.alpha=0.1 clients=8 --out shards
"""
_INFO_DEADLINE_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (the process's own arguments by default) describes.

    Returns:
        The exit status: 0, or 1 after one line on stderr, or 130 after Ctrl-C.
    """
    try:
        with ending_with_its_reader():
            arguments = _arguments(argv)
            arguments.command(arguments)
    except (FedsplitError, OSError) as exc:
        print(f"error: {_one_line(str(exc))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more:
        # argparse takes what stands between options for the command's own only once.
        if not hasattr(arguments, "words") or any(word.startswith("-") for word in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        arguments.words += more
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedsplit",
        description="Federated split learning of Hugging Face language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: fedsplit {name} {example}"
        command = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
        command.set_defaults(command=run)
        return command

    split = add(
        "split", _split, "cut a model into its two parts", "gpt2 --split 1/10/1 --out parts"
    )
    split.add_argument("model", metavar="MODEL", help="directory of a whole model, or a hub id")
    split.add_argument("--split", required=True, metavar="1/2/1", help="blocks of bottom/trunk/top")
    split.add_argument("--out", required=True, metavar="DIR", help="new or empty directory")
    split.add_argument("--revision", default="main", metavar="R", help="of a hub id; default main")
    example = "parts/bottom-top parts/trunk --out whole"
    join = add("join", _join, "make the whole model of its two parts", example)
    join.add_argument("client", metavar="CLIENT_DIR", help="the bottom-top part's directory")
    join.add_argument("trunk", metavar="TRUNK_DIR", help="the trunk part's directory")
    join.add_argument("--out", required=True, metavar="DIR", help="new or empty directory")
    info = add("info", _info, "ask a running trunk server what it is", "127.0.0.1:9500")
    info.add_argument("address", metavar="ADDRESS", help="host:port, or unix:path")
    info.add_argument("--tls-ca", default="", metavar="FILE", help="PEM of the authority to trust")
    plot = add("plot", _plot, "draw the loss of a run again", "runs/default")
    plot.add_argument("run_dir", metavar="RUN_DIR", help="the folder that a run left")
    example = "runs/default runs/default-2 --out compared"
    compare = add("compare", _compare, "put runs side by side, as a table and a picture", example)
    folders = "a folder that a run left, or a folder of such folders"
    compare.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=folders)
    out = "where to leave table.json and compare.png; default: compare/ beside the first run"
    compare.add_argument("--out", metavar="DIR", help=out)
    example = "sharding=dirichlet sharding.alpha=0.1 clients=8 --out shards"
    shards = add("shards", _shards, "show which client of a run has what to train on", example)
    overrides = "group=option or field=value, as of a run"
    shards.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=overrides)
    shards.add_argument("--out", metavar="DIR", help="where to leave shards.png and shards.json")
    add_commands(add)
    return parser


# --- one function a command -------------------------------------------------------------------


def _split(arguments: argparse.Namespace) -> None:
    from fedsplit.console import quiet_libraries
    from fedsplit.model.checkpoint import split_checkpoint

    quiet_libraries()
    split = SplitSpec.parse(arguments.split)
    with _filled_whole(Path(arguments.out)) as folder:
        made = split_checkpoint(arguments.model, split, folder, revision=arguments.revision)
    for name in made:
        print(_part_line(Path(arguments.out, name)))


def _part_line(directory: Path) -> str:
    from fedsplit.model.checkpoint import WEIGHTS
    from fedsplit.model.manifest import Manifest
    from fedsplit.model.source import tensor_names
    from fedsplit.runs.metrics import in_mib

    manifest, weights = Manifest.read(directory), directory / WEIGHTS
    first, end = manifest.trunk_blocks
    split = SplitSpec.parse(manifest.split)
    num_blocks = end - first if manifest.part == "trunk" else split.bottom + split.top
    return (
        f"{directory}: {num_blocks} blocks, {len(tensor_names(weights))} tensors, "
        f"{in_mib(weights.stat().st_size)}, fingerprint {manifest.fingerprint}"
    )


def _join(arguments: argparse.Namespace) -> None:
    from fedsplit.console import quiet_libraries
    from fedsplit.model.checkpoint import join_checkpoint
    from fedsplit.model.source import Source

    quiet_libraries()
    with _filled_whole(Path(arguments.out)) as folder:
        join_checkpoint(arguments.client, arguments.trunk, folder)
        Source(name=arguments.client).copy_texts(folder)
    print(f"{arguments.out}: the whole model, for AutoModelForCausalLM.from_pretrained")


def _info(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our one line
    from fedsplit.transport.client import GrpcLink
    from fedsplit.wire.messages import ServiceInfoRequest

    if ":" not in arguments.address:
        raise ConfigError(f"ADDRESS={arguments.address!r} is neither host:port nor unix:path")
    wire = WireSpec(tls_ca=arguments.tls_ca, call_deadline_s=_INFO_DEADLINE_S)
    with closing(GrpcLink(arguments.address, wire=wire)) as link:
        told = link.exchange(ServiceInfoRequest())
    limits = told.limits
    rows = {
        "family": told.family,
        "blocks (bottom/trunk/top)": told.blocks,
        "fingerprint of model and cut": told.model,
        "parameter version": told.version,
        "open sessions": told.sessions,
        "largest request": f"{limits.max_rows} sequences of {limits.max_tokens} tokens",
        "hidden size": limits.hidden_size,
        "wire protocol": told.protocol,
        "incarnation of the server": told.incarnation,
    }
    if told.served:
        rows["trunks here, by name"] = ", ".join(told.served)
    for name, value in rows.items():
        print(f"{name:<28}  {_one_line(str(value))}")


def _plot(arguments: argparse.Namespace) -> None:
    from fedsplit.runs.folder import RunFolder
    from fedsplit.runs.loss_plot import plot_losses

    print(plot_losses(RunFolder(Path(arguments.run_dir))))


def _compare(arguments: argparse.Namespace) -> None:
    from fedsplit.runs.compare import COLUMNS, Table, grouped, plot, read_runs, rows_of

    groups = grouped(read_runs(map(Path, arguments.run_dirs)))
    table = Table(rows=rows_of(groups), columns=COLUMNS)
    out = Path(arguments.out or Path(arguments.run_dirs[0]).parent / "compare")
    print(f"{table}\n\n{table.write(out)}\n{plot(groups, out)}")


def _shards(arguments: argparse.Namespace) -> None:
    from fedsplit.config import compose
    from fedsplit.data import hold_out, load_corpus, shard
    from fedsplit.runs.shard_stats import Holdings

    run = compose(arguments.overrides)
    corpus, _ = hold_out(load_corpus(run.data, run.task), run.data.held_out, run.seed)
    holdings = Holdings.of(shard(corpus, run.sharding, run.clients, run.seed))
    title = f"{corpus.name}, sharding={run.sharding.kind}, seed={run.seed}"
    print(f"{_one_line(title)}\n\n{holdings.table}")
    if left_out := corpus.num_bytes - holdings.everybody.bytes:
        print(f"{left_out:,} bytes are left out by {run.sharding.target}")
    if arguments.out is None:
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / "shards.json", holdings.json)
    holdings.plot(out / "shards.png", title)
    print(f"\n{out / 'shards.png'}\n{out / 'shards.json'}")


# --- what they share --------------------------------------------------------------------------


@contextmanager
def _filled_whole(out: Path) -> Iterator[Path]:
    """A folder to write to; what it holds at the end moves to `out`, and after an error nothing.

    Raises:
        ConfigError: There is something at `out` already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new or an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        yield Path(folder)
        for written in Path(folder).iterdir():
            written.rename(out / written.name)


def _one_line(text: str) -> str:
    """What a peer or a library wrote, without the line ends and control characters in it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
