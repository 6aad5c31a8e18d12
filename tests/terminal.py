"""The command line as a person types it: a process of its own, and what it leaves to read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

COMMAND = [sys.executable, "-m", "fusebn"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def type_in(*args: object, command: list[str] = COMMAND, **env: str) -> Result:
    """Run a command line in a terminal's width, and return what a person sees."""
    process = subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **env},
        timeout=240,
    )
    assert "Traceback" not in process.stderr, process.stderr
    return Result(process.returncode, process.stdout, process.stderr)


class Demo(NamedTuple):
    out: str
    report: Path
    model: Path


def type_in_demo(folder: Path, suffix: str, *options: object) -> Demo:
    """Run the demo, which must succeed without a word on the standard error."""
    code, out, err = type_in("demo", *options, "--out", folder)
    assert (code, err) == (0, "")
    return Demo(out, folder / "report.html", folder / f"report.{suffix}")


def type_in_without_space(folder: Path, *options: object) -> str:
    """Run the demo where no file may pass 100 KiB, less than it writes; return its complaint."""
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *COMMAND]
    code, _, err = type_in("demo", *options, "--epochs", 1, "--out", folder, command=limited)
    assert code == 2
    return err


def share(text: str, pattern: str) -> float:
    """Return the percentage that follows a pattern."""
    found = re.search(pattern + r"\D*?(\d+\.\d) %", text)
    assert found, text
    return float(found[1])


class Tuned(NamedTuple):
    """What the demo says of so many bits: accuracies in percent, and the network folded."""

    in_float: float
    quantized: float
    fine_tuned: float
    same: str
    difference: float


def last_act(demo: Demo) -> dict[int, Tuned]:
    """Return what the demo says of each number of bits."""
    rows = printed_rows(demo.out.split("Quantized fine-tuning")[1])
    rows = [row for row in rows if row[0].isdecimal()]
    tuning, folding = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    found = {}
    for (bits, *shares), (again, same, difference) in zip(tuning, folding, strict=True):
        assert bits == again
        accuracies = [float(share.removesuffix(" %")) for share in shares]
        found[int(bits)] = Tuned(*accuracies, same, float(difference))
    return found


def assert_last_act(demo: Demo, *bits: int) -> None:
    """Assert that few bits cost little, and that folding costs nothing."""
    found = last_act(demo)
    assert tuple(found) == bits
    for tuned in found.values():
        assert tuned.fine_tuned > tuned.in_float - 3
        assert tuned.quantized > tuned.in_float - 5
        assert tuned.same == "360 of 360"
        assert 0 < tuned.difference < 1e-4
    assert len({tuned.in_float for tuned in found.values()}) == 1
    assert len(set(found.values())) == len(bits)  # so they were switched on


def printed_rows(text: str) -> list[list[str]]:
    """Return the lines of a terminal as rows of cells."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


class Page(HTMLParser):
    """What the tests ask of a page. Raises AssertionError where a tag closes another's element."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data
