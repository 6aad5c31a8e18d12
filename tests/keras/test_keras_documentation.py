"""docs/keras.md names what there is, and runs on every backend.

On the one of this process tests/test_docs.py runs it.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest

import fusebn.keras as fbk
from terminal import type_in

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "keras.md"
ARGUMENTS = "How do I write it into a new model?"

# As tests/test_docs.py does it, in a process that has another backend.
RUN = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import test_docs
class Capture:
    def readouterr(self):
        text, self.text = self.text, ""
        return type("Out", (), dict(out=text))
    text = ""
    def write(self, text): self.text += text
    def flush(self): pass
class Here:
    def chdir(self, path): pass
sys.stdout = capture = Capture()
test_docs.test_snippets(pathlib.Path({page!r}), None, Here(), capture)
"""


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]
