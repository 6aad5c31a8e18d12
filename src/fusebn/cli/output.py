"""Files that appear whole or not at all, and a terminal that shows what concerns its reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """Give a scratch folder inside `folder`, whose files move to `folder` when the block succeeds.

    Entering raises OSError if `folder` cannot be made or written. If the block fails, or is
    interrupted, everything is as it was.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fusebn-", dir=folder) as scratch:
            yield Path(scratch)
            # In this order a file of data, model.onnx.data, comes before the model that needs it.
            for file in sorted(Path(scratch).iterdir(), reverse=True):
                os.replace(file, folder / file.name)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what C++ writes to the standard error off the terminal, unless the block fails."""
    with TemporaryFile() as kept:
        terminal = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
