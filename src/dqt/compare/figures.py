"""The plots of a comparison: loss against bytes (the frontier), loss and flips over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from dqt.errors import DqtError
from dqt.plots import LIGHT, Theme, column, draw, smooth
from dqt.report import read_run
from dqt.sizes import format_bytes

Content = Mapping[str, Any]


def draw_all(content: Content) -> dict[str, bytes]:
    """PNG files by name, from the content of `results.json`; those that would be empty are left out."""
    figures = {"frontier": _frontier, "curves": _curves, "flips": _flips}
    drawn = {
        name: draw(partial(plot, content), LIGHT, steps=name != "frontier") for name, plot in figures.items()
    }
    return {name: png for name, png in drawn.items() if png is not None}


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points (bytes, loss) that no other beats in both, by bytes."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _frontier(content: Content, figure: Any, theme: Theme) -> bool:
    arms = [arm for arm in content["arms"] if arm["loss"]["mean"] is not None and arm["state_bytes"]]
    if not arms:
        return False
    figure.set_size_inches(7.2, 7.2)
    kinds = (
        ("bytes_a_weight", "bytes a linear weight: codes, remainder, moments"),
        ("state_bytes", "bytes of the whole training state, gradients too"),
    )
    labels = []
    for axes, (key, title) in zip(figure.subplots(2, 1), kinds, strict=True):
        points = [(arm[key], arm["loss"]["mean"]) for arm in arms]
        line = frontier(points)
        axes.step(*zip(*line, strict=True), where="post", color=theme.faint, zorder=1)
        halves = [arm["loss"]["half"] or 0.0 for arm in arms]
        axes.errorbar(*zip(*points, strict=True), yerr=halves, fmt="o", color=theme.curves[0], markersize=4)
        axes.set_xscale("log")
        low, high = min(point[0] for point in points), max(point[0] for point in points)
        ticks = [tick * 10.0**power for power in range(-1, 13) for tick in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        axes.set_xticks([tick for tick in ticks if 0.9 * low < tick < 1.1 * high], minor=False)
        axes.xaxis.set_major_formatter(lambda value, _, key=key: _size(value, key))
        axes.set_xticks([], minor=True)
        axes.set(xlabel=title, ylabel="loss, nats a token")
        axes.margins(0.12)
        labels.append(partial(label_points, axes, points, [arm["arm"] for arm in arms], theme))
    figure.draw_without_rendering()  # so that axes stand where they will be
    for label in labels:
        label()
    return True


def _size(value: float, key: str) -> str:
    return f"{value:g}" if key == "bytes_a_weight" else format_bytes(value)


def label_points(axes: Any, points: list[tuple[float, float]], names: list[str], theme: Theme) -> None:
    """Names beside their points, each at the nearest height where it lies over no other name or point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    pixels = axes.transData.transform(points)
    pixels_a_point = axes.figure.dpi / 72
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(3 * pixels_a_point) for x, y in pixels]
    for index in np.argsort(pixels[:, 1]):
        before = pixels[index, 0] > axes.bbox.x0 + axes.bbox.width / 2
        beside = -10 if before else 10
        name = axes.annotate(
            names[index],
            points[index],
            xytext=(beside, 0),
            textcoords="offset points",
            ha="right" if before else "left",
            va="center",
            fontsize=6,
            arrowprops={
                "arrowstyle": "-",
                "color": theme.faint,
                "relpos": (before, 0.5),  # from the end of the name that is nearer
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
        name.get_window_extent()  # puts the text where it belongs, but measures the line with it
        box = Text.get_window_extent(name)
        place = _free(box, taken, axes.bbox)
        name.set_position((beside, place / pixels_a_point))
        taken.append(box.translated(0, place))


def _free(box: Any, taken: list[Any], inside: Any) -> float:
    """How far up, at the least, a box has to move to lie over none of `taken`; below zero it is down."""
    step = box.height / 4
    for distance in range(int(inside.height / step)):
        for place in (distance * step, -distance * step):
            moved = box.translated(0, place)
            within = inside.y0 <= moved.y0 and moved.y1 <= inside.y1
            if within and not any(moved.overlaps(other) for other in taken):
                return place
    return 0.0  # more names than there is room for


def _curves(content: Content, figure: Any, theme: Theme) -> bool:
    return _over_steps(content, figure, "loss", "training loss (smoothed), nats a token")


def _flips(content: Content, figure: Any, theme: Theme) -> bool:
    return _over_steps(content, figure, "flip_rate", "share of codes that changed in a step", log=True)


def _over_steps(content: Content, figure: Any, key: str, label: str, log: bool = False) -> bool:
    """A curve an arm, of its first finished seed."""
    import matplotlib

    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for arm in content["arms"]:
        finished = [run for run in arm["runs"] if run["state"] == "finished"]
        try:
            lines = read_run(finished[0]["directory"]).training if finished else []
        except DqtError:  # deleted since
            lines = []
        steps, values = column(lines, key)
        if len(steps) and not any(np.array_equal(values, other) for _, other in series.values()):
            series[arm["arm"]] = steps, values
    if not series:
        return False
    figure.set_size_inches(7.2, 4.4 + 0.08 * len(series))
    axes = figure.subplots()
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(series)))
    for (name, (steps, values)), color in zip(series.items(), colors, strict=True):
        axes.plot(steps, smooth(values, max(1, len(steps) // 20)), color=color, linewidth=1, label=name)
    if log:
        if any(values.any() for _, values in series.values()):  # in a run of few steps no code may move
            axes.set_yscale("log")
    else:
        late = [values[len(values) // 10 :] for _, values in series.values()]
        axes.set_ylim(
            min(map(np.min, late)) - 0.05, max(float(np.quantile(values, 0.98)) for values in late) + 0.05
        )
    axes.set(xlabel="step", ylabel=label)
    axes.legend(fontsize=6, ncols=2)
    return True
