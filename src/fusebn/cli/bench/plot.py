"""The picture: bars against the floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusebn.cli.bench.results import Results, Row, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "fusebn": "#0b7a75",
    "torch": "#d9583b",
    "tensorflow": "#e59f3c",
    "jax": "#6c6fb3",
    "keras": "#b5485d",
    "onnxruntime": "#5b8fb9",
    "onednn": "#8c8c8c",
    # on a GPU
    "fusebn-2": "#7cc0bb",
    "eager": "#d9583b",
    "compile": "#e59f3c",
    "apex": "#6c6fb3",
}
INK, FAINT = "#222222", "#8a8a8a"
CUT = 8.0  # times the floor; a longer bar is cut and its number tells


def plot(results: Results, path: Path) -> list[Path]:
    """Write a PNG and an SVG beside it: one panel for each element type and layout."""
    from matplotlib.figure import Figure

    rows = summary(results)
    panels = list(dict.fromkeys((row.dtype, row.layout) for row in rows))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in panels))
    layouts = list(dict.fromkeys(layout for _, layout in panels))
    slots = {
        dtype: _slots([row for row in rows if row.dtype == dtype], results) for dtype in dtypes
    }
    heights = [sum(len(who) + 1 for who in slots[dtype].values()) for dtype in dtypes]
    top, bottom = 1.2, 0.95
    height = top + bottom + sum(heights) * 0.165 + 0.55 * len(dtypes)
    figure = Figure(figsize=(5.2 * len(layouts) + 1.6, height))
    axes = figure.subplots(
        len(dtypes), len(layouts), squeeze=False, sharex=True, height_ratios=heights or None
    )
    figure.subplots_adjust(
        left=1.75 / figure.get_figwidth(),
        right=1 - 0.35 / figure.get_figwidth(),
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.08,
        hspace=0.45 / (sum(heights) * 0.165 / max(len(dtypes), 1)) if dtypes else 0,
    )
    longest = 1.0
    for i, dtype in enumerate(dtypes):
        for j, layout in enumerate(layouts):
            mine = _of(rows, dtype, layout)
            longest = max(longest, _panel(axes[i][j], mine, slots[dtype], first=j == 0))
            axes[i][j].set_title(f"{dtype}, {layout}", fontsize=10, loc="left", color=INK)
    for axis in axes[-1]:
        axis.set_xlim(0, min(longest, CUT) * 1.2)
        axis.set_xlabel("time / memory floor", fontsize=9, color=INK)
    figure.text(
        0.2 / figure.get_figwidth(),
        1 - 0.32 / height,
        "Batch normalization against the speed of memory",
        fontsize=14,
        weight="bold",
        color=INK,
    )
    _legend(figure, rows, results, height)
    figure.text(
        0.2 / figure.get_figwidth(),
        0.14 / height,
        results.footnote,
        fontsize=7.5,
        color=FAINT,
    )
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in written:
        figure.savefig(file, dpi=160)
    return written


def _of(rows: list[Row], dtype: str, layout: str) -> list[Row]:
    return [row for row in rows if (row.dtype, row.layout) == (dtype, layout)]


def _contenders(row: Row, results: Results) -> list[str]:
    measured = row.over_floor | row.over_floor_fresh
    return [who for who in ("fusebn", *results.peers) if who in measured]


def _slots(rows: list[Row], results: Results) -> dict[str, list[str]]:
    """Return whose bars each verb has in any layout: panels in a line are cut alike."""
    slots: dict[str, list[str]] = {}
    for row in rows:
        seen = {*slots.get(row.verb, []), *_contenders(row, results)}
        slots[row.verb] = [who for who in ("fusebn", *results.peers) if who in seen]
    return slots


def _panel(axis: Axes, rows: list[Row], slots: dict[str, list[str]], first: bool) -> float:
    """Draw the verbs of a type and layout; return the longest ratio."""
    y, ticks, longest = 0.0, [], 1.0
    by_verb = {row.verb: row for row in rows}
    for verb, contenders in slots.items():
        ticks.append((y + (len(contenders) - 1) / 2, verb))
        row = by_verb.get(verb)
        warms, freshes = (row.over_floor, row.over_floor_fresh) if row else ({}, {})
        for who in contenders:
            warm, fresh = warms.get(who), freshes.get(who)
            colour = COLOURS[who]
            if fresh is not None:
                axis.barh(y, min(fresh, CUT), height=0.84, color=colour, alpha=0.28, linewidth=0)
            if warm is not None:
                axis.barh(y, min(warm, CUT), height=0.84, color=colour, linewidth=0)
            _label(axis, y, warm, fresh, bold=who == "fusebn")
            longest = max(longest, warm or 0, fresh or 0)
            y += 1
        y += 1
    axis.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_ylim(max(y - 1.2, 0.5), -0.8)
    axis.set_yticks(
        [at for at, _ in ticks], [verb if first else "" for _, verb in ticks], fontsize=9
    )
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, colors=FAINT)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    return longest


def _label(axis: Axes, y: float, warm: float | None, fresh: float | None, *, bold: bool) -> None:
    """Write the warm ratio, and the fresh one in brackets, at the end of the bar."""
    value = warm if warm is not None else fresh
    if value is None:
        return
    end = min(max(warm or 0, fresh or 0), CUT)
    text = f"{value:.2f}"
    if warm is not None and fresh is not None:
        text += f" ({fresh:.2f})" if fresh < 10 else f" ({fresh:.0f})"
    if max(warm or 0, fresh or 0) > CUT:  # a gap in the bar says that it is longer
        axis.barh(y, 0.05, left=CUT - 0.35, height=1, color="white", linewidth=0, zorder=3)
    axis.annotate(
        text,
        (end, y),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=6.8,
        color=INK if bold else FAINT,
        weight="bold" if bold else "normal",
    )


def _legend(figure: Any, rows: list[Row], results: Results, height: float) -> None:
    from matplotlib.patches import Patch

    seen = {who for row in rows for who in _contenders(row, results)}
    peers = {p: f"{results.title(p)} {v}".strip() for p, v in results.peers.items()}
    names = {"fusebn": "fusebn"} | peers
    handles = [Patch(color=COLOURS[who], label=name) for who, name in names.items() if who in seen]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.14 / figure.get_figwidth(), 1 - 0.38 / height),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
    )
