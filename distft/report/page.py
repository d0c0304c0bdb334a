"""A sweep as one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import html
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft import __version__
from distft.report import figures
from distft.report.read import Job, SweepFolder, told
from distft.report.verdict import Setting, Verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Nothing may be fetched, whatever stands in the page; plotly writes styles and draws pictures from its own data.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
.wide { overflow-x: auto; } th, td { text-align: left; padding: 4px 10px; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.best { background: #eef6ee; } tr.failed { background: #fbeeee; } tr.pruned, tr.interrupted { color: #777; }
.verdict { border-left: 4px solid #3366cc; padding: .4rem 1rem; background: #f5f7fb; }
code, pre { font: 13px/1.5 ui-monospace, monospace; background: #f4f4f4; }
pre { padding: .6rem 1rem; overflow-x: auto; } p.note { color: #666; font-size: 13px; }
"""


def page(sweep: SweepFolder, settings: Sequence[Setting], verdict: Verdict, importances: dict[str, float]) -> str:
    """The whole page. Every value from the sweep is escaped."""
    folder = sweep.folder.absolute()
    title = f"Sweep {folder.name}"
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="verdict">{text(verdict.sentence)}</p>',
        *best(sweep),
        *section("Evaluation", figures.curves(sweep, "evaluation"), "Dotted: not run to its end."),
        *section("Training", figures.curves(sweep, "train"), "Click a job in the legend to hide it."),
        *section("Jobs and their knobs", figures.parallel(sweep), "A line a job, the best one thick and dark."),
        *section("Importance of each knob", figures.bars(importances), "PED-ANOVA of the jobs that ran to their end."),
        *section("Spread over seeds", figures.spread(sweep, settings), "A dot a seed, a line at the mean."),
        "<h2>Jobs</h2>",
        table(sweep),
        *failures(sweep),
        f'<p class="note">distft {__version__}, {time.strftime("%Y-%m-%d %H:%M")}; {text(str(folder))}</p>',
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n<script>{plotly_source()}</script></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def text(value: str) -> str:
    return html.escape(value)


def plotly_source() -> str:
    """plotly.js itself, so that the page fetches nothing."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def section(title: str, figure: Figure | None, note: str) -> Iterator[str]:
    if figure is None:
        return
    import plotly.io

    name = title.lower().replace(" ", "-")
    yield f"<h2>{text(title)}</h2>"
    config = {"displaylogo": False, "responsive": True}
    yield plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=config)
    yield f'<p class="note">{text(note)}</p>'


def best(sweep: SweepFolder) -> Iterator[str]:
    """The best run, and what repeats it."""
    ranked = sweep.ranked()
    if not ranked:
        return
    job = ranked[0]
    yield f"<h2>The best run: job {job.number}</h2>"
    yield f"<p>{text(sweep.metric)} {job.objective:.6g} at step {job.best_step} of {job.steps}. Repeat it:</p>"
    yield f"<pre>{text(repeat(job))}</pre>"


def repeat(job: Job) -> str:
    """The command that repeats a run."""
    return f"python train.py --config-dir {shlex.quote(str(job.folder))} --config-name config"


def table(sweep: SweepFolder) -> str:
    names = [*sweep.knobs]
    head = "".join(f"<th>{text(name)}</th>" for name in ("job", *names, "state"))
    head += f'<th class="number">{text(sweep.metric)}</th><th class="number">at step</th><th class="number">steps</th>'
    first = sweep.ranked()[:1]
    lines = [row(job, names, "best" if job in first else job.state) for job in in_order(sweep)]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def in_order(sweep: SweepFolder) -> list[Job]:
    """Those that count by their value, then the others."""
    ranked = sweep.ranked()
    return [*ranked, *(job for job in sweep.jobs if job not in ranked)]


def row(job: Job, names: Sequence[str], kind: str) -> str:
    cells = [str(job.number), *(told(job.values[name]) for name in names), state_of(job)]
    numbers = ["" if job.objective is None else f"{job.objective:.6g}", told(job.best_step), told(job.steps)]
    inner = "".join(f"<td>{text(cell)}</td>" for cell in cells)
    inner += "".join(f'<td class="number">{text(number)}</td>' for number in numbers)
    return f'<tr class="{text(kind)}">{inner}</tr>'


def state_of(job: Job) -> str:
    words = job.state.replace("_", " ")
    return f"{words} ({job.exit_code})" if job.state == "failed" else words


def failures(sweep: SweepFolder) -> Iterator[str]:
    """Why jobs failed or were pruned."""
    told_ones = [job for job in sweep.jobs if job.state in ("failed", "pruned", "interrupted")]
    if not told_ones:
        return
    yield "<h2>Failed, pruned and interrupted jobs</h2><ul>"
    for job in told_ones:
        reason = job.reason or f"see {job.folder} and the sweep's logs"
        yield f"<li>Job {job.number}, {text(state_of(job))}: {text(reason)}</li>"
    yield "</ul>"


def write(path: Path, content: str) -> None:
    """At once or not at all."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.write_text(content, encoding="utf-8")
    staged.replace(path)
