"""Real data: the 1797 handwritten digits that come with scikit-learn, 8x8 pixels each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

from fusebn.cli.demo.network import Array

_SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


class Digits(NamedTuple):
    """Images as rows of 64 pixels from 0 to 1, and what they show."""

    images: Array
    labels: Array


def split(seed: int) -> tuple[Digits, Digits]:
    """Return digits to train on, and one in five of the originals held out.

    The first also come moved by one pixel to each of the four sides: still the same digits, and
    five times as many.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    x, held_out_x, y, held_out_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    framed = np.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moved = [framed[:, 1 + i : 9 + i, 1 + j : 9 + j].reshape(-1, 64) for i, j in _SHIFTS]
    return Digits(np.concatenate(moved), np.tile(y, len(moved))), Digits(held_out_x, held_out_y)
