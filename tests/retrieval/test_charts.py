"""Charts whose labels must stay legible."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from retrieval.report.charts import name_dots, named_points


@pytest.mark.parametrize("n", [1, 3, 13])
def test_labels_of_close_points_overlap_neither_each_other_nor_a_point(n):
    """Costs and scores as in the study: several models at nearly the same point."""
    rng = np.random.default_rng(n)
    pairs = [(f"hybrid over model {i}", 10 + rng.random(), 0.2 + 0.002 * rng.random()) for i in range(n)]
    figure, axes = plt.subplots(figsize=(4.6, 4.8), dpi=72)
    axes.plot([p[1] for p in pairs], [p[2] for p in pairs], "o")
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.15)
    names = name_dots(axes, pairs)
    assert sorted(text.get_text() for text in names) == sorted(name for name, *_ in pairs)
    assert len(axes.texts) == n
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for _, x, y in pairs:
        point = axes.transData.transform((x, y))
        assert not any(box.contains(*point) for box in boxes)
    plt.close(figure)


def test_chart_shows_every_label_once():
    svg = named_points([("a", 1.0, 0.1), ("b", 1.0, 0.1), ("c", 30.0, 0.2)], "cost", "score")
    assert [svg.count(f">{name}<") for name in "abc"] == [1, 1, 1]
