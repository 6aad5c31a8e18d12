"""Every example in a docstring, in the README and in docs/ runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import fusebn

ROOT = Path(__file__).parent.parent
MODULES = ["fusebn"] + [
    module.name
    for module in pkgutil.walk_packages(fusebn.__path__, "fusebn.")
    if module.name != "fusebn.__main__"
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = [e for test in finder.find(fusebn) for e in test.examples]
    assert len(examples) > 40


# Keras makes arrays of TensorFlow's tensors in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_snippets(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.S | re.M)
    assert snippets
    names: dict[str, object] = {"np": np}
    for snippet in snippets:
        exec(compile(snippet, str(path), "exec"), names)
        said = re.findall(r"^ *print\(.*\)  # (.*)$", snippet, re.M)
        assert capsys.readouterr().out.splitlines() == said
