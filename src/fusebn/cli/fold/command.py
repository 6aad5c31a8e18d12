"""The command line of `fusebn fold`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from fusebn.cli.output import all_or_nothing


def _shapes(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for value in values:
        name, _, sizes = value.rpartition("=")
        try:
            shapes[name] = tuple(map(int, sizes.split("x")))
        except ValueError:
            shapes[name] = ()
        if not name or not shapes[name] or min(shapes[name]) < 0:
            raise click.BadParameter(f"{value!r} is not of the form NAME=1x3x224x224.")
    return shapes


_OLD = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("source", metavar="IN", type=_OLD)
@click.argument("target", metavar="OUT", type=_NEW)
@click.option("--force", is_flag=True, help="OUT may be IN.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_shapes,
    metavar="NAME=1x3x224x224",
    help="The shape of an input for the comparison, where the model does not say it.",
)
def fold(source: Path, target: Path, force: bool, shapes: dict[str, tuple[int, ...]]) -> None:
    """Fold the batch norms of an ONNX model, and write the model that is left.

    Each BatchNormalization is folded into the Conv, ConvTranspose, Gemm or MatMul before it, or the
    one behind it where that is exact. Everything else stays as it is.

    Both models then run on random input. If an answer has moved by more than rounding explains, no
    file is written: 1e-4 of the largest value of an output for weights of float32, 1e-10 for
    float64, 0.02 for float16, 0.1 for bfloat16.
    """
    if target.exists() and target.samefile(source) and not force:
        raise click.BadParameter("is IN; --force replaces it.", param_hint="'OUT'")
    # Here, not above: they need the extra `onnx`; the first is what is missing without it.
    import onnx  # noqa: F401

    from fusebn.cli.fold.job import run

    try:
        with all_or_nothing(target.absolute().parent) as scratch:
            run(source, target, scratch, shapes, Console())
    except OSError as error:
        raise click.BadParameter(f"cannot write {target} ({error}).", param_hint="'OUT'") from error
    click.echo(f"Wrote {target}.")
