"""Plots of a study as SVG, readable on light and dark pages.

Decides how figures look. Invariant: the same figures give the same bytes: nothing in a plot is random or dated.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pygal
from pygal.style import Style

from servers.study.cells import PERCENTS, Summary

COLORS: Final = ("#1b7fd4", "#d9541e", "#2a9d5c", "#9b59b6", "#c79a00", "#d6458c", "#16a3a3", "#8c6d4f", "#7f8c8d")
"""Of middling lightness: they stand out on white and on black."""

SHORTEST_S: Final = 0.01
_GREY: Final = "#808080"
_STYLE: Final = Style(
    background="transparent",
    plot_background="transparent",
    foreground=_GREY,
    foreground_strong=_GREY,
    foreground_subtle=_GREY,
    opacity="1",
    opacity_hover="1",
    transition="0s",
    stroke_width="2.5",
    stroke_width_hover="2.5",
    guide_stroke_color=_GREY,
    major_guide_stroke_color=_GREY,
    font_family="system-ui, sans-serif",
    label_font_size=13,
    legend_font_size=14,
    title_font_size=17,
    colors=COLORS,
)
_DARK: Final = (
    "<style>.pygal-chart text{fill:#24292f!important}.pygal-chart .guide{stroke-opacity:.35}"
    "@media(prefers-color-scheme:dark){.pygal-chart text{fill:#e6edf3!important}}</style></defs>"
)
_SHOWN: Final = {
    "style": _STYLE,
    "js": [],
    "width": 900,
    "height": 480,
    "legend_at_bottom": True,
    "legend_at_bottom_columns": 4,
    "disable_xml_declaration": True,
    "show_minor_x_labels": True,
}


def write(directory: Path, summaries: Sequence[Summary]) -> list[Path]:
    """The plots of a study whose runs are all at one rate, into files of that directory, which is made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    by_strategy: dict[str, list[Summary]] = {}
    for summary in summaries:
        by_strategy.setdefault(summary.strategy, []).append(summary)
    directory.mkdir(parents=True, exist_ok=True)
    plots = {"ttft": ttft(by_strategy), "loads": loads(by_strategy)}
    plots |= {"goodput": over_time(by_strategy, 2), "utilisation": over_time(by_strategy, 1)}
    written = []
    for name, text in plots.items():
        path = directory / f"{name}.svg"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def ttft(by_strategy: Mapping[str, Sequence[Summary]]) -> str:
    """Time to the first token over percentiles, on a logarithmic scale; refused requests are beyond it."""
    chart = pygal.Line(
        **_SHOWN, title="Time to the first token", x_title="percent of requests", y_title="seconds", logarithmic=True, show_dots=False
    )
    chart.x_labels = [f"{percent:g}" for percent in PERCENTS]
    for strategy, runs in by_strategy.items():
        means = [_mean([run.ttft_s[percent] for run in runs]) for percent in PERCENTS]
        chart.add(strategy, [max(value, SHORTEST_S) if math.isfinite(value) else None for value in means])
    return _rendered(chart)


def loads(by_strategy: Mapping[str, Sequence[Summary]]) -> str:
    """Model loads per 1,000 requests."""
    chart = pygal.HorizontalBar(
        **_SHOWN, title="Model loads per 1,000 requests", print_values=True, value_formatter=lambda value: f"{value:.1f}"
    )
    for strategy, runs in by_strategy.items():
        chart.add(strategy, _mean([run.loads_per_1000 for run in runs]))
    return _rendered(chart)


def over_time(by_strategy: Mapping[str, Sequence[Summary]], column: int) -> str:
    """Utilisation (1) or goodput (2) over the time of the run, the mean of its seeds."""
    title = {1: "Utilisation of the nodes", 2: "Goodput: first token within 5 s, then 10 tokens/s"}[column]
    chart = pygal.XY(**_SHOWN, title=title, x_title="minutes", y_title="percent", show_dots=False, range=(0, 100))
    for strategy, runs in by_strategy.items():
        windows = zip(*(run.over_time for run in runs), strict=False)
        points = [(_mean([point[0] for point in window]) / 60, 100 * _mean([point[column] for point in window])) for window in windows]
        chart.add(strategy, points)
    return _rendered(chart)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _rendered(chart: Any) -> str:
    render: Callable[[], str | bytes] = chart.render
    drawn = render()
    text = drawn if isinstance(drawn, str) else drawn.decode()
    text = re.sub(r"<!--.*?-->|<script.*?</script>", "", text, flags=re.DOTALL).replace(chart.uuid, "plot")
    return text.replace("</defs>", _DARK, 1) + "\n"
