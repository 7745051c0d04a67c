"""The plots of a comparison: what lies on the frontier, and names that can be read."""

from __future__ import annotations

from itertools import combinations

import matplotlib.text
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dqt.compare.figures import frontier, label_points
from dqt.plots import LIGHT


def test_the_frontier_is_what_nothing_beats() -> None:
    points = [(12.0, 2.0), (1.0, 3.0), (2.0, 2.5), (2.0, 2.4), (4.0, 2.6), (12.0, 1.9)]
    assert frontier(points) == [(1.0, 3.0), (2.0, 2.4), (12.0, 1.9)]


def test_names_lie_beside_their_points_and_over_no_other() -> None:
    crowd = [(8.0, 2.3 + 0.01 * step) for step in range(8)]
    points = [(1.0, 3.0), *crowd]
    figure = Figure(figsize=(7.2, 3.6), dpi=144)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o")
    axes.set_xscale("log")
    label_points(axes, points, [f"name {index}" for index in range(len(points))], LIGHT)
    names = {each.get_text(): each for each in axes.texts}
    figure.draw_without_rendering()
    boxes = {name: matplotlib.text.Text.get_window_extent(each) for name, each in names.items()}
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for one, other in combinations(boxes.values(), 2))
    assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes.values())
    assert names["name 0"].xyann == (10, 0)  # alone: not moved
    np.testing.assert_allclose(
        boxes["name 0"].y0 + boxes["name 0"].height / 2, axes.transData.transform(points)[0, 1], atol=3
    )
