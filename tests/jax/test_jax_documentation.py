"""docs/jax.md names what there is. That its examples run is in tests/test_docs.py."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import jax

import fusebn.jax as fbj

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "jax.md"


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def found(name: str) -> bool:
    root: object = fbj
    for part in name.split(".")[1:]:
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def test_every_name_of_ours_exists() -> None:
    names = set(re.findall(r"\bfbj(?:\.\w+)+", PAGE.read_text()))
    assert len(names) >= 4
    assert [name for name in sorted(names) if not found(name)] == []


def test_every_public_name_is_mentioned() -> None:
    text = PAGE.read_text()
    assert [name for name in fbj.__all__ if f"{name}" not in text] == []
    for layer in (fbj.equinox, fbj.linen, fbj.nnx):
        assert all(f"fbj.{layer.__name__[11:]}.{name}" in text for name in layer.__all__)


def test_the_table_of_arguments_has_all_that_is_ours() -> None:
    told = {name for row in table("How do I use it in my model?") for name in words(row[0])}
    for ours in (fbj.linen.BatchNorm, fbj.nnx.BatchNorm):
        theirs = ours.__mro__[1]
        for method in ("__init__", "__call__"):
            has, had = (parameters(getattr(kind, method)) for kind in (ours, theirs))
            assert has - had <= told
            assert method == "__call__" or has - had >= {"activation", "correction", "nonfinite"}


def test_its_defaults_are_those_of_the_code() -> None:
    defaults = inspect.signature(fbj.nnx.BatchNorm.__init__).parameters
    for row in table("How do I use it in my model?"):
        [name], default = words(row[0]), row[-1].strip('`|" ')
        if name in defaults and default != "as in Flax":
            assert str(defaults[name].default) == default, name


def test_it_says_the_version_that_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = ".".join(jax.__version__.split(".")[:2])
    assert f"JAX {version} or later" in PAGE.read_text()
    assert project["optional-dependencies"]["jax"] == [f"jax>={version}"]


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        path, _, anchor = link.partition("#")
        target = PAGE.parent / path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, link


def words(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]
