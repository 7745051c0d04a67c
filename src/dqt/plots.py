"""The plots of a report, drawn by matplotlib in a light and a dark theme.

Every function takes the run's metrics as plain lists and draws one figure; a figure that would be empty is
left out (float baselines have no codes, short runs no evaluation). No display is needed, and matplotlib is
imported on first use, since that takes a second. Each figure is drawn twice, once a theme, so that the page
suits either: the price is another second.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Series = Sequence[Mapping[str, Any]]

MAX_TENSORS = 6
MAX_AREAS = 4  # up to so many levels an area per code, above a heat map


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: paper, ink, faint lines, and those of the curves."""

    paper: str
    ink: str
    faint: str
    curves: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#d0d7de", ("#0969da", "#d1570b", "#1a7f5a", "#8250df"))
DARK = Theme("#161b22", "#e6edf3", "#3d444d", ("#58a6ff", "#f0883e", "#3fb98a", "#bc8cff"))


@dataclass(frozen=True)
class RunSeries:
    """What is drawn.

    Attributes:
        training: Lines of metrics with "step" and "loss", in order of step.
        evaluation: Lines with "step" and "val_loss".
        codes: Lines with "step" and "codes", a name to counts mapping.
        unigram_nats: The loss of a model without context, or None.
    """

    training: Series
    evaluation: Series
    codes: Series
    unigram_nats: float | None = None


def draw_all(run: RunSeries, theme: Theme) -> dict[str, bytes]:
    """Draws every figure that the run has data for; returns PNG files by name."""
    figures = {"loss": _loss, "flips": _flips, "codes": _codes, "training": _training}
    drawn = {name: draw(partial(plot, run), theme) for name, plot in figures.items()}
    return {name: png for name, png in drawn.items() if png is not None}


def column(lines: Series, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, where it is a number; NaN and Inf are left out."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Mean over about `span` points around each, without lag.

    Fewer points towards the start, where the loss falls fast. Towards the end, where it hardly does and one
    batch would stand for the result (0.3 nats off in a run of `micro`), the line through the last points.
    """
    reach = min(span // 2, (len(values) - 1) // 2)
    if reach < 1:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values) - reach)
    before = np.minimum(index, reach)
    means = (total[index + before + 1] - total[index - before]) / (2 * before + 1)
    last, at = values[-2 * reach - 1 :], np.arange(2 * reach + 1)
    line = np.polyval(np.polyfit(at, last, 1), at).clip(last.min(), last.max())
    return np.concatenate([means, line[-reach:]])


def draw(plot: Callable[[Any, Theme], bool], theme: Theme, steps: bool = True) -> bytes | None:
    """Draws one figure.

    Args:
        plot: Draws on a matplotlib figure, and says whether there was anything to draw.
        theme: Its colours.
        steps: Whether the horizontal axes count steps, which are whole numbers.

    Returns:
        A PNG file; None if it would be empty.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "axes.grid": True,
        "grid.alpha": 0.5,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=theme.curves),
        "font.size": 10,
        "axes.titlesize": 10,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained", dpi=144)
        FigureCanvasAgg(figure)
        if not plot(figure, theme):
            return None
        for axes in figure.axes if steps else ():
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _line(axes: Any, lines: Series, key: str, **style: Any) -> bool:
    steps, values = column(lines, key)
    if len(steps):
        # A single point would draw no line at all.
        axes.plot(steps, values, **({"marker": "o", "markersize": 4} if len(steps) < 3 else {}) | style)
    return len(steps) > 0


def _loss(run: RunSeries, figure: Any, theme: Theme) -> bool:
    axes = figure.subplots()
    steps, values = column(run.training, "loss")
    drawn = len(steps) > 0
    if len(steps) >= 20:
        axes.plot(steps, values, color=theme.curves[0], alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(values, len(steps) // 20), color=theme.curves[0], label="training (smoothed)")
    elif drawn:
        axes.plot(steps, values, color=theme.curves[0], marker="o", markersize=3, label="training")
    style: dict[Any, Any] = {
        "color": theme.curves[1],
        "marker": "o",
        "markersize": 4,
        "linewidth": 1.8,
        "label": "validation",
    }
    drawn |= _line(axes, run.evaluation, "val_loss", **style)
    if not drawn:
        return False
    if run.unigram_nats is not None:
        label = f"unigram entropy {run.unigram_nats:.2f}"
        axes.axhline(run.unigram_nats, color=theme.ink, linestyle="--", linewidth=1, alpha=0.6, label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    return True


def _flips(run: RunSeries, figure: Any, theme: Theme) -> bool:
    if not any(line.get("flip_rate") is not None for line in run.training):
        return False
    left, right = figure.subplots(1, 2)
    _line(left, run.training, "flip_rate", color=theme.curves[0], linewidth=1.2)
    left.set_title("codes that changed in a step")
    for (key, label), color in zip(
        (("zeros", "zero"), ("saturated", "at the end of the range")), theme.curves, strict=False
    ):
        _line(right, run.training, key, color=color, label=label)
    right.set_title("share of codes")
    right.legend()
    for axes in (left, right):
        _from_zero(axes)
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(_percent)
    return True


def _codes(run: RunSeries, figure: Any, theme: Theme) -> bool:
    names = list(run.codes[-1]["codes"]) if run.codes else []
    if not names:
        return False
    if len(names) > MAX_TENSORS:  # evenly through the depth of the model
        names = [names[round(i * (len(names) - 1) / (MAX_TENSORS - 1))] for i in range(MAX_TENSORS)]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure.set_size_inches(7.2, 2.5 * rows)
    for index, (axes, name) in enumerate(
        zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False)
    ):
        points = [line for line in run.codes if name in line["codes"]]
        counts = np.array([line["codes"][name] for line in points], dtype=float).T  # [levels, points]
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        _one_tensor(axes, np.array([line["step"] for line in points], dtype=float), shares, theme)
        axes.set_title(short_name(name), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(False)
        if index % columns == 0:
            axes.set_ylabel("share of codes" if len(shares) <= MAX_AREAS else "code", fontsize=8)
        if index >= len(names) - columns:
            axes.set_xlabel("step", fontsize=8)
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    return True


def _one_tensor(axes: Any, steps: np.ndarray, shares: np.ndarray, theme: Theme) -> None:
    """Shares [levels, points] of a tensor's codes over the steps: stacked areas, or a heat map."""
    if len(steps) == 1:  # an evaluation at the start only: draw it as wide as a step
        steps, shares = np.array([steps[0], steps[0] + 1]), np.repeat(shares, 2, axis=1)
    if len(shares) <= MAX_AREAS:
        values = code_values(len(shares))
        colors = [theme.faint if v == "0" else theme.curves[0 if v[0] == "-" else 1] for v in values]
        axes.stackplot(steps, shares, colors=colors, edgecolor=theme.paper, linewidth=0.8)
        middles = np.cumsum(shares[:, -1]) - shares[:, -1] / 2
        for value, middle, share in zip(values, middles, shares[:, -1], strict=True):
            if share > 0.06:
                color = theme.ink if value == "0" else theme.paper
                at = (steps[-1] - 0.03 * np.ptp(steps), middle)
                axes.annotate(value, at, color=color, ha="right", va="center", fontsize=8, weight="bold")
        axes.set(ylim=(0, 1), xlim=(steps[0], steps[-1]))
        axes.yaxis.set_major_formatter(_percent)
    else:
        from matplotlib.colors import LinearSegmentedColormap

        heat = LinearSegmentedColormap.from_list("codes", (theme.paper, theme.curves[0]))
        code = np.arange(len(shares)) - len(shares) // 2
        # Square root: rare codes at the ends of the range are seen beside the common ones.
        axes.pcolormesh(steps, code, np.sqrt(shares), cmap=heat, vmin=0, shading="nearest", rasterized=True)


def _training(run: RunSeries, figure: Any, theme: Theme) -> bool:
    known = (
        ("lr", "learning rate", 1.0),
        ("grad_norm", "gradient norm", 1.0),
        ("tokens_per_second", "tokens a second", 1.0),
        ("memory_bytes", "memory of the process, MB", 1e-6),
    )
    panels = [panel for panel in known if len(column(run.training, panel[0])[0])]
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    figure.set_size_inches(7.2, 2.2 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (key, title, unit) in zip(grid, panels, strict=False):
        steps, values = column(run.training, key)
        axes.plot(steps, values * unit, linewidth=1.2, marker="o" if len(steps) < 3 else None)
        axes.set_title(title)
        _from_zero(axes)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 6))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - 2) : len(panels)]:
        axes.set_xlabel("step")
    return True


def code_values(levels: int) -> list[str]:
    """What the codes of a format with so many levels stand for, in grid steps, lowest first."""
    if levels == 2:
        return ["-½", "+½"]
    lowest = -(levels // 2)
    return [f"{value:+d}" if value else "0" for value in range(lowest, lowest + levels)]


def short_name(name: str) -> str:
    """A parameter's name without what all of them share."""
    return name.removeprefix("model.").replace("layers.", "").removesuffix(".weight")


def _from_zero(axes: Any) -> None:
    """An axis from zero to a little above the highest value."""
    top = max((np.max(line.get_ydata()) for line in axes.lines), default=1.0)
    axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)


def _percent(value: float, position: Any = None) -> str:
    return f"{100 * value:.4g}%"
