"""The command line `fusebn`. It lives on extras; without them it says which one to install."""

import sys

_EXTRAS = {
    *("click", "rich", "sklearn", "threadpoolctl", "matplotlib", "tensorflow"),
    *("onnx", "onnxruntime"),
}
# Command -> the extra it needs; all others need `cli`.
_EXTRA_OF = {"demo": "demo", "fold": "onnx"}


def main() -> None:
    """Run the command that the arguments name."""
    try:
        # Here, not above: this module must import without the extras.
        from fusebn.cli.commands import cli

        cli(prog_name="fusebn")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        needed = next((_EXTRA_OF[word] for word in sys.argv[1:] if word in _EXTRA_OF), "cli")
        wanted = (needed, "tensorflow")
        extra = ",".join(wanted[: 1 + any("tensorflow" in argument for argument in sys.argv[1:])])
        print(
            f"fusebn: this needs {package}, which is not installed. To install it:\n"
            f"    pip install 'fusebn[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
