"""The commands and their options; what they do stands in modules of their own."""

from __future__ import annotations

import json
from errno import EISDIR
from os import strerror
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import fusebn
from fusebn.cli.bench import bench
from fusebn.cli.fold import fold
from fusebn.cli.info import show
from fusebn.cli.output import all_or_nothing

_INTERRUPTED = 130  # What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C ends it with the status that shells expect, where click has 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("fusebn: interrupted; no unfinished file is left.", err=True)
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fusebn.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Batch normalization, written once and written right."""


cli.add_command(bench)
cli.add_command(fold)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs to read.")
def info(as_json: bool) -> None:
    """Show what runs on this machine."""
    facts = fusebn.info()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show(facts, Console())


@cli.command()
@click.option(
    "--framework",
    type=click.Choice(["numpy", "torch", "jax", "keras", "tensorflow"]),
    default="numpy",
    show_default=True,
    help="What the network is written in. PyTorch, JAX, Keras: with its own batch norms, and with "
    "ours; Keras on the backend of KERAS_BACKEND. TensorFlow: a graph with a session.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Decides the split of the data, the first weights and the order of the batches.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    show_default="20; with torch, jax and keras 5",
    help="Passes over the training digits.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("fusebn-report"),
    show_default=True,
    help="A folder, or the path of an .html file. Existing files are replaced.",
)
def demo(framework: str, seed: int, epochs: int | None, out: Path) -> None:
    """Train on handwritten digits, and write a report.

    Shows what batch normalization does, what people get wrong about it, and what that costs.
    """
    is_file = out.suffix.lower() in (".html", ".htm") and not out.is_dir()
    report = (out if is_file else out / "report.html").absolute()
    try:
        if report.is_dir():
            raise IsADirectoryError(EISDIR, strerror(EISDIR), str(report))
        with all_or_nothing(report.parent) as scratch:
            # Here, not above: it needs the extra `demo`, and takes a second.
            from fusebn.cli.demo import run

            model = run(framework, seed, epochs, scratch / report.name, Console())
    except OSError as error:
        message = f"cannot write {report} ({error})."
        raise click.BadParameter(message, param_hint="'--out'") from error
    click.echo(f"Report: {report}")
    click.echo(f"Model:  {report.with_name(model.name)}")
