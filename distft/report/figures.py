"""The pictures of a sweep, as plotly figures."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distft.report.importance import is_logarithmic, numbers_of
from distft.report.read import Job, Point, SweepFolder, told
from distft.report.verdict import Setting

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_POINTS = 400  # of a curve: more cannot be seen
LAYOUT = {"template": "plotly_white", "margin": {"l": 60, "r": 20, "t": 40, "b": 50}, "hovermode": "closest"}
COLOURS = ["#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395"]


def shown(text: str, longest: int = 60) -> str:
    """Text for plotly, which takes some HTML for formatting: here none of it."""
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…", quote=False)


def name_of(job: Job, sweep: SweepFolder) -> str:
    values = " ".join(f"{name}={told(job.values[name])}" for name in sweep.knobs)
    return shown(f"{job.number}: {values}" if values else str(job.number))


def thinned(points: Sequence[Point]) -> list[Point]:
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    return [*points[: len(points) - 1 : every], *points[-1:]] if every > 1 else list(points)


def curves(sweep: SweepFolder, which: str) -> Figure | None:
    """The curve of every job. `which`: train or evaluation."""
    import plotly.graph_objects as graph

    figure = graph.Figure(layout=LAYOUT)
    for job in sweep.jobs:
        points = thinned(job.train if which == "train" else job.evaluation)
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        line = {"color": COLOURS[job.number % len(COLOURS)], "dash": "solid" if job.counts else "dot"}
        mode = "lines" if which == "train" else "lines+markers"
        figure.add_scatter(
            x=steps, y=values, mode=mode, line=line, name=name_of(job, sweep), legendgroup=str(job.number)
        )
    if not figure.data:
        return None
    name = "train/loss" if which == "train" else sweep.metric
    return figure.update_layout(xaxis_title="step", yaxis_title=shown(name), showlegend=True, height=420)


def parallel(sweep: SweepFolder) -> Figure | None:
    """Every job a line through its knobs to its value, the better the darker.

    Lines of a plain plot: plotly's own parallel coordinates need WebGL, which browsers on servers do not have.
    """
    import plotly.graph_objects as graph
    from plotly.colors import sample_colorscale

    jobs = sweep.ranked()
    if len(jobs) < 2 or not sweep.knobs:
        return None
    axes = [*(axis(jobs, name) for name in sweep.knobs), scale(sweep.metric, [job.objective or 0.0 for job in jobs])]
    figure = graph.Figure(layout=LAYOUT)
    for index in reversed(range(len(jobs))):  # the best on top
        share = index / (len(jobs) - 1)
        figure.add_scatter(
            x=list(range(len(axes))),
            y=[one.heights[index] for one in axes],
            mode="lines+markers",
            line={"color": sample_colorscale("Viridis", [0.95 * share])[0], "width": 3 if index == 0 else 1.5},
            name=name_of(jobs[index], sweep),
            text=[f"{one.name}={one.words[index]}" for one in axes],
            hovertemplate=f"job {jobs[index].number}<br>%{{text}}<extra></extra>",
        )
    for place, one in enumerate(axes):
        figure.add_vline(x=place, line={"color": "#999", "width": 1})
        look = {"showarrow": False, "xanchor": "right", "xshift": -6, "bgcolor": "white"}
        for height, word in one.ticks:
            figure.add_annotation(x=place, y=height, text=word, **look)
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=[one.name for one in axes], side="top")
    figure.update_xaxes(range=[-0.35, len(axes) - 0.8], zeroline=False, showgrid=False)
    figure.update_yaxes(visible=False, range=[-0.08, 1.08])
    return figure.update_layout(height=420, showlegend=False)


@dataclass(frozen=True)
class Axis:
    """An axis of the parallel coordinates: of each job its height from 0 to 1 and its value as a word."""

    name: str
    heights: list[float]
    words: list[str]
    ticks: list[tuple[float, str]]


def axis(jobs: Sequence[Job], name: str) -> Axis:
    """The axis of a knob: by number where its values are numbers, by word else."""
    numbers = numbers_of(jobs, name)
    if numbers is not None:
        return scale(name, numbers)
    words = [shown(told(job.values[name]), 24) for job in jobs]
    known = sorted(set(words))
    heights = {word: index / max(1, len(known) - 1) for index, word in enumerate(known)}
    return Axis(shown(name), [heights[word] for word in words], words, [(heights[word], word) for word in known])


def scale(name: str, numbers: Sequence[float]) -> Axis:
    """An axis of numbers: logarithmic where they span much."""
    low, high = min(numbers), max(numbers)
    logarithmic = is_logarithmic(numbers)

    def height(number: float) -> float:
        if low == high:
            return 0.5
        if logarithmic:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    marks = sorted(set(numbers))
    if len(marks) > 6:
        parts = [index / 4 for index in range(5)]
        marks = [low * (high / low) ** part if logarithmic else low + (high - low) * part for part in parts]
    ticks = [(height(mark), f"{mark:.4g}") for mark in marks]
    return Axis(shown(name), [height(number) for number in numbers], [f"{number:.6g}" for number in numbers], ticks)


def bars(importances: dict[str, float]) -> Figure | None:
    """The importance of each knob."""
    import plotly.graph_objects as graph

    if not importances:
        return None
    names, shares = list(importances)[::-1], list(importances.values())[::-1]
    figure = graph.Figure(graph.Bar(x=shares, y=[shown(name) for name in names], orientation="h"), layout=LAYOUT)
    height = 120 + 34 * len(names)
    return figure.update_layout(xaxis_title="share", xaxis_range=[0, 1], height=height, margin={"l": 200})


def spread(sweep: SweepFolder, settings: Sequence[Setting]) -> Figure | None:
    """Every setting's values, one a seed, and their mean."""
    import plotly.graph_objects as graph

    if not any(len(setting.values) > 1 for setting in settings):
        return None
    figure = graph.Figure(layout=LAYOUT)
    for setting in settings:
        word = shown(setting.words)
        figure.add_scatter(x=list(setting.values), y=[word] * len(setting.values), mode="markers", marker_size=9)
        symbol = {"symbol": "line-ns-open", "size": 22, "color": "black"}
        figure.add_scatter(x=[setting.mean], y=[word], mode="markers", marker=symbol)
    height = 140 + 40 * len(settings)
    return figure.update_layout(xaxis_title=shown(sweep.metric), showlegend=False, height=height, margin={"l": 260})
