"""docs/tensorflow.md names what there is. That its examples run is in tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import tensorflow as tf

import fusebn.tensorflow as fbt

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "tensorflow.md"

# Gone from TensorFlow 2.21, and the reason for this page.
GONE = {"tf.contrib.layers.batch_norm", "tf.layers.batch_normalization"}


def found(root: object, name: str) -> bool:
    for part in name.split(".")[1:]:
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_every_name_of_ours_exists() -> None:
    names = set(re.findall(r"\bfbt(?:\.\w+)+", PAGE.read_text()))
    assert [name for name in sorted(names) if not found(fbt, name)] == []


def test_every_public_name_has_an_old_call() -> None:
    new = " ".join(row[1] for row in table("Old call, new call"))
    for module in (fbt.nn, fbt.layers, fbt.moving_averages):
        for name in module.__all__:
            assert f"fbt.{module.__name__.rpartition('.')[2]}.{name}" in new


def test_old_calls_are_tensorflows() -> None:
    old = " ".join(row[0] for row in table("Old call, new call"))
    names = set(re.findall(r"\btf(?:\.\w+)+", old)) - GONE
    assert len(names) > 10
    # tf.compat.v1.layers raises for whoever asks whether it has an attribute.
    names -= {"tf.compat.v1.layers.batch_normalization"}
    assert [name for name in sorted(names) if not found(tf, name)] == []
    assert not any(found(tf, name) for name in GONE)


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors
        else:
            assert (PAGE.parent / link).exists(), link
