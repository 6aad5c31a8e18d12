"""The figures of the report, as SVG that takes its colors and fonts from the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fusebn import batch_normalization
from fusebn.cli.demo.findings import percent
from fusebn.cli.demo.network import CORRECTION, EPSILON, Array, First
from fusebn.cli.demo.quantized import Quantization, Tuned
from fusebn.cli.demo.watch import History
from fusebn.quantize import FakeQuantize

# matplotlib knows no CSS variables: it draws in these colors, which are then replaced, so that one
# figure suits a light page and a dark one.
_VARIABLES = {
    "#000001": "--ink",
    "#000002": "--muted",
    "#000003": "--line",
    "#000004": "--series-1",
    "#000005": "--series-2",
    "#000006": "--series-3",
    "#000007": "--series-4",
}
_INK, _MUTED, _LINE, *_SERIES = _VARIABLES

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fusebn",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def learning(history: History) -> list[str]:
    """Return two figures: the loss of each step, the accuracy after each epoch."""
    with mpl.rc_context(_STYLE):
        loss, axes = _blank("Loss", "training step")
        steps = np.arange(1, len(history.loss) + 1)
        axes.semilogy(steps, history.loss, color=_SERIES[0], alpha=0.3, lw=0.7, label="each step")
        axes.semilogy(steps, _smooth(history.loss), color=_SERIES[0], label="running average")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="upper right")

        accuracy, axes = _blank("Held-out accuracy, inference mode", "epoch")
        epochs = np.arange(1, len(history.accuracy) + 1)
        shares = 100 * np.array(history.accuracy)
        axes.plot(epochs, shares, color=_SERIES[0], marker="o", ms=3.5)
        axes.axhline(97, color=_MUTED, lw=1, ls=(0, (4, 3)))
        axes.text(epochs[-1], 96.9, "target 97 %", color=_MUTED, size=9, ha="right", va="top")
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.set_xlim(0.5, len(epochs) + 0.5)
        axes.set_ylim(min(shares.min(), 96) - 1, 100.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return [
            _svg(
                loss,
                "loss",
                f"Line chart: the training loss falls from {history.loss[0]:.2f} at the first step "
                f"to {np.mean(history.loss[-50:]):.4f} at the end.",
            ),
            _svg(
                accuracy,
                "accuracy",
                f"Line chart: held-out accuracy is {percent(history.accuracy[0])} after the first "
                f"epoch and {percent(history.accuracy[-1])} after the last.",
            ),
        ]


def convergence(history: History, channels: list[int]) -> list[str]:
    """Return two figures: moving means and variances on their way to the population's."""
    moving = {"mean": history.moving_mean, "variance": history.moving_variance}
    exact = {
        "mean": [moments.mean for moments in history.population],
        "variance": [moments.variance(CORRECTION) for moments in history.population],
    }
    per_epoch = len(history.loss) // len(history.population)
    steps = np.arange(1, len(history.loss) + 1)
    count = len(history.population)
    epochs = sorted({*(2**k for k in range(count.bit_length())), count})
    figures = []
    with mpl.rc_context(_STYLE):
        for name, values in moving.items():
            figure, axes = _blank(f"Moving {name}", "training step, logarithmic")
            for channel, color in zip(channels, _SERIES, strict=True):
                axes.semilogx(steps, [v[channel] for v in values], color=color, lw=1.1)
                population = [exact[name][epoch - 1][channel] for epoch in epochs]
                ends = [epoch * per_epoch for epoch in epochs]
                axes.plot(ends, population, "o", color=color, ms=6, mfc="none", mew=1.3)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.plot([], [], color=_MUTED, lw=1.1, label="moving average")
            axes.plot([], [], "o", color=_MUTED, ms=5, mfc="none", label="population, exact")
            axes.legend(loc="best")
            what = f"Line chart: the moving {name} of four channels over {len(values)} steps"
            alt = f"{what}, each on the population's {name}, drawn as circles."
            figures.append(_svg(figure, name, alt))
    return figures


def activations(first: First, images: Array) -> list[str]:
    """Return two figures: what reaches the first normalization, and what it becomes."""
    some = np.argsort(first.moving_mean)[::5]
    before = first.out(images)[:, some]
    after = batch_normalization(
        before, first.moving_mean[some], first.moving_variance[some], None, None, EPSILON
    )
    limit = 1.05 * max(
        np.abs(np.percentile(values, (5, 95), axis=0)).max() for values in (before, after)
    )
    figures = []
    with mpl.rc_context(_STYLE):
        for title, values in (("Before normalization", before), ("After normalization", after)):
            figure, axes = _blank(title, "channels, in the order of their moving means")
            low, lower, upper, high = np.percentile(values, (5, 25, 75, 95), axis=0)
            mean, at = values.mean(axis=0), np.arange(len(some))
            axes.vlines(at, low, high, color=_SERIES[0], lw=1, alpha=0.5)
            axes.vlines(at, lower, upper, color=_SERIES[0], lw=3.2)
            axes.plot(at, mean, "o", color=_SERIES[1], ms=3.4)
            axes.set(xlim=(-1, len(some)), ylim=(-limit, limit), xticks=[])
            alt = (
                f"Range chart, {title.lower()}: the means of {len(some)} channels lie between "
                f"{mean.min():.2f} and {mean.max():.2f}, their standard deviations between "
                f"{values.std(axis=0).min():.2f} and {values.std(axis=0).max():.2f}."
            )
            figures.append(_svg(figure, title.split()[0].lower(), alt))
    return figures


def quantization(last_act: Quantization) -> list[str]:
    """Return two figures: the accuracies with fewer bits, and what few bits make of a variable."""
    with mpl.rc_context(_STYLE):
        return [_accuracies(last_act.tuned), _levels(np.sort(last_act.first.moving_mean))]


def _accuracies(tuned: Sequence[Tuned]) -> str:
    figure, axes = _blank("Held-out accuracy", "bits")
    at, lowest = np.arange(len(tuned)), 97.0
    stages = (
        ("in_float", "floating point"),
        ("quantized", "quantized"),
        ("fine_tuned", "fine-tuned"),
    )
    for i, (stage, label) in enumerate(stages):
        shares = [100 * getattr(one, stage) for one in tuned]
        axes.plot(at + 0.15 * (i - 1), shares, "o", color=_SERIES[i], ms=6, label=label)
        lowest = min(lowest, *shares)
    axes.set_xticks(at, [str(one.bits) for one in tuned])
    # Below is room for the legend.
    axes.set(xlim=(-0.5, len(at) - 0.5), ylim=(lowest - 0.4 * (100 - lowest), 100.3))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.legend(loc="lower left")
    told = ", ".join(f"{percent(one.fine_tuned)} with {one.bits} bits" for one in tuned)
    return _svg(figure, "bits", f"Dot chart: accuracy after fine-tuning is {told}.")


def _levels(exact: Array) -> str:
    figure, axes = _blank("Moving means of the first layer", "channels, in their order")
    axes.plot(exact, "o", color=_SERIES[0], ms=2.6, label="floating point")
    for color, bits in ((_SERIES[1], 4), (_SERIES[2], 3)):
        levels = FakeQuantize(bits)(exact)
        axes.step(np.arange(len(exact)), levels, color=color, where="mid", label=f"{bits} bits")
    axes.set(xticks=[])
    axes.legend(loc="upper left")
    alt = (
        f"Step chart: the moving means of {len(exact)} channels, from {exact[0]:.2f} to "
        f"{exact[-1]:.2f}, rounded to 16 levels and to 8."
    )
    return _svg(figure, "levels", alt)


def _blank(title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    return figure, axes


def _smooth(values: list[float], weight: float = 0.05) -> Array:
    """Return the exponential average, free of its initial value."""
    total, weights, smooth = 0.0, 0.0, []
    for value in values:
        total += weight * (value - total)
        weights += weight * (1 - weights)
        smooth.append(total / weights)
    return np.array(smooth)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an element of an HTML page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", stream.getvalue(), flags=re.DOTALL)
    width, height = 72 * figure.get_size_inches()
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}">'
    svg = re.sub(r"^.*?<svg[^>]*>", opening, svg, count=1, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    # A hundredth of a point is enough, and halves the page.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    # Every figure has an "axes_1"; in one page they must differ.
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("xlink:href", "href")
