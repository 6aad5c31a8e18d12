"""docs/keras.md names what there is, and runs on other backends than that of tests/test_docs.py."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from pathlib import Path

import keras

import fusebn.keras as fbk
from terminal import type_in

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "keras.md"
ARGUMENTS = "How do I write it into a new model?"


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_its_examples_run_on_another_backend(tmp_path: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    said = re.findall(r"^ *print\(.*\)  # (.*)$", "\n".join(snippets), re.M)
    here = f"import os\nos.chdir({str(tmp_path)!r})\n"
    program = [sys.executable, "-c"]
    found = type_in(here + "\n".join(snippets), command=program, KERAS_BACKEND="jax")
    assert found.code == 0, found.err
    assert found.out.splitlines() == said
    assert len(said) > 10


def test_every_name_of_ours_exists() -> None:
    names = set(re.findall(r"\bfbk\.(\w+)", PAGE.read_text()))
    assert names >= set(fbk.__all__)
    assert [name for name in sorted(names) if not hasattr(fbk, name)] == []


def test_the_table_of_arguments_has_all_that_is_ours() -> None:
    told = {name for row in table(ARGUMENTS) for name in re.findall(r"`(\w+)`", row[0])}
    for method in ("__init__", "call"):
        ours, theirs = (
            set(inspect.signature(getattr(kind, method)).parameters)
            for kind in (fbk.BatchNormalization, keras.layers.BatchNormalization)
        )
        assert ours - theirs - {"self"}
        assert ours - theirs <= told


def test_its_defaults_are_those_of_the_code() -> None:
    layer, call = fbk.BatchNormalization.__init__, fbk.BatchNormalization.call
    for row in table(ARGUMENTS):
        [name] = re.findall(r"`(\w+)`", row[0])
        default = row[-1].strip('`|" ')
        place = layer if row[1] == "the layer" else call
        assert str(inspect.signature(place).parameters[name].default) == default, name


def test_it_says_the_version_that_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = ".".join(keras.__version__.split(".")[:2])
    assert f"Keras {version} or later" in PAGE.read_text()
    assert project["optional-dependencies"]["keras"] == [f"keras>={version}"]


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        path, _, anchor = link.partition("#")
        assert (PAGE.parent / path).exists(), link
        assert not anchor
