"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


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
            for file in Path(scratch).iterdir():
                os.replace(file, folder / file.name)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
