"""docs/pytorch.md names what there is. That its examples run is in tests/test_docs.py."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import torch

import fusebn.torch as fbt

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "pytorch.md"


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_every_name_of_ours_exists() -> None:
    names = set(re.findall(r"\bfbt\.(\w+)", PAGE.read_text()))
    assert len(names) >= 6
    assert [name for name in sorted(names) if not hasattr(fbt, name)] == []


def test_every_public_name_is_mentioned() -> None:
    text = PAGE.read_text().replace("`2d` and `3d`", "BatchNorm2d, BatchNorm3d")
    missing = [name for name in fbt.__all__ if name not in text]
    assert [name for name in missing if not name.startswith("Lazy")] == []
    assert "lazy" in text


def test_the_table_of_arguments_is_whole() -> None:
    rows = table("How do I write it into a new model?")
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    module, call = fbt.BatchNorm2d.__init__, fbt.BatchNorm2d.forward
    ours = {*inspect.signature(module).parameters, *inspect.signature(call).parameters}
    assert told == ours - {"self", "num_features", "input"}


def test_its_defaults_are_those_of_the_code() -> None:
    parameters = inspect.signature(fbt.BatchNorm2d.__init__).parameters
    for row in table("How do I write it into a new model?"):
        name, default = row[0].strip("`"), row[-1].strip('`|" ')
        if name in parameters and default:
            assert str(parameters[name].default) == default, name


def test_every_argument_stands_where_the_table_says() -> None:
    places = {
        "modules": fbt.BatchNorm2d.__init__,
        "`batch_norm`": fbt.batch_norm,
        "a module's call": fbt.BatchNorm2d.forward,
    }
    for arguments, where, *_ in table("How do I write it into a new model?"):
        for place, function in places.items():
            taken = set(inspect.signature(function).parameters)
            for name in re.findall(r"`(\w+)`", arguments)[:1]:
                if "momentum" not in arguments:
                    assert (name in taken) == (place in where), (name, place)


def test_it_says_the_version_that_is_needed_and_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = ".".join(torch.__version__.split(".")[:2])
    assert f"PyTorch {version} or later" in PAGE.read_text()
    assert f"torch>={version}" in project["optional-dependencies"]["torch"]


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        path, _, anchor = link.partition("#")
        target = PAGE.parent / path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, link
