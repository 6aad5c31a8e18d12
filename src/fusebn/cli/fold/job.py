"""From one file to the other: read, fold, tell, write, compare."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

import fusebn.onnx
from fusebn.cli.fold import files
from fusebn.cli.fold.answers import Shapes, compare
from fusebn.cli.fold.table import show


def run(source: Path, target: Path, scratch: Path, shapes: Shapes, console: Console) -> None:
    """Leave in `scratch` what is to stand where `target` is, or raise click's exception."""
    model, external = files.read(source)
    folded, report = fusebn.onnx.fold(model)
    if not report:
        raise click.ClickException(f"{source} has no BatchNormalization; nothing was written.")
    show(report, console)
    count = sum(row.layer is not None for row in report)
    if not count:
        raise click.ClickException("None could be folded; nothing was written.")
    new = scratch / target.name
    files.write(folded, new, files.unused_data_name(target) if external else None)
    if files.is_valid(source) and not files.is_valid(new):
        raise click.ClickException("The folded model is not valid; nothing was written.")
    agreement = compare(source, new, model, shapes)
    inputs = ", ".join(f"{name} of shape {list(shape)}" for name, shape in agreement.shapes.items())
    click.echo(
        f"{count} of {len(report)} folded. Answers differ by {agreement.difference:.1e} of the "
        f"largest, {agreement.tolerance:.0e} is allowed ({agreement.runner}; random {inputs})."
    )
