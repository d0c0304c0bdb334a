"""`distft report <sweep folder>`: a sweep's jobs as a table and as one HTML page, and what is more than noise."""

from __future__ import annotations

from pathlib import Path

from distft.config.schema.report import ReportOn
from distft.errors import DONE, UserMistake
from distft.report.read import SweepFolder, read, told
from distft.report.verdict import Verdict, decide, settings_of

PAGE = "report.html"


def main(report: ReportOn, folder: str) -> int:
    """Print the table and the verdict, and write the page. Returns exit code 0.

    Raises:
        UserMistake: the folder is no sweep's, the page cannot be written, or its libraries are missing.
    """
    try:
        import optuna
        import plotly
        import scipy
    except ImportError as error:
        raise UserMistake(f"distft report needs {error.name}: pip install 'distft[sweep]'") from None
    del optuna, plotly, scipy
    from distft.report.importance import importance
    from distft.report.page import page, repeat, write

    sweep = read(Path(folder).expanduser())
    settings = settings_of(sweep)
    verdict = decide(settings, sweep.smaller_is_better)
    importances = importance(sweep)
    tell(sweep, verdict, importances)
    if ranked := sweep.ranked():
        print(f"Repeat the best run: {repeat(ranked[0])}")
    path = Path(report.report.output).expanduser() if report.report.output else sweep.folder / PAGE
    try:
        write(path, page(sweep, settings, verdict, importances))
    except OSError as error:
        raise UserMistake(f"report.output={path} cannot be written: {error.strerror}. Name another file.") from None
    print(f"The page: {path}")
    return DONE


def tell(sweep: SweepFolder, verdict: Verdict, importances: dict[str, float]) -> None:
    """The same on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from distft.report.page import in_order, state_of

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", *sweep.knobs, "state"):
        table.add_column(Text(name))
    for name in (sweep.metric, "at step", "steps"):
        table.add_column(Text(name), justify="right")
    for job in in_order(sweep):
        words = [str(job.number), *(told(job.values[name]) for name in sweep.knobs), state_of(job)]
        value = "" if job.objective is None else f"{job.objective:.6g}"
        table.add_row(*(Text(word) for word in [*words, value, told(job.best_step), told(job.steps)]))
    console.print(table)
    if importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in importances.items())
        console.print(Text(f"Importance: {shares} (PED-ANOVA over {len(sweep.ranked())} jobs)"))
    for job in sweep.jobs:
        if job.state == "failed":
            console.print(Text(f"Job {job.number} failed: {job.reason or f'see {job.folder}'}"))
    console.print(Text(verdict.sentence))
