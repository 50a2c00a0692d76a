"""The page of the commands: what `--help` prints for `fedsplit` and each of its commands."""

from collections.abc import Iterator

import click
import typer

from fedsplit.cli import typer_app

_HEAD = """# Commands

The help of `fedsplit` and of each of its commands. [Config fields](config.md) has the fields that
commands take as `field=value`.

This page is made of `fedsplit/cli/` by `python -m simulations.reference --write`."""

_WIDTH = 100


def page() -> str:
    """Return the page: a section for each command, in the order of `fedsplit --help`."""
    return "\n\n".join([_HEAD, *_sections()]) + "\n"


def _sections() -> Iterator[str]:
    app = typer_app()
    # With a mode, typer prints boxes for the width of the terminal.
    app.rich_markup_mode = None
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group), "it has several commands"
    settings = {**group.context_settings, "terminal_width": _WIDTH}
    context = click.Context(group, info_name="fedsplit", **settings)
    yield _section(context)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command, "it is listed"
        yield _section(click.Context(command, info_name=name, parent=context))


def _section(context: click.Context) -> str:
    """Return the section of a command, which does not depend on the terminal."""
    lines = (line.rstrip() for line in context.get_help().splitlines())
    return "\n".join([f"## {context.command_path}", "", "```text", *lines, "```"])
