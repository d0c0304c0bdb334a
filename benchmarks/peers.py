"""distft against TRL's SFTTrainer, LLaMA-Factory and the plain transformers Trainer on the same work.

    python benchmarks/peers.py --bars                  the cells that have bars, 5 repeats, and how each bar stands
    python benchmarks/peers.py --table                 every cell, fewer steps
    python benchmarks/peers.py "nano LoRA, padded"     some cells by name (--list names them)
    python benchmarks/peers.py --toy                   one small cell, to see that it works

Every program runs in an environment of its own (made here the first time) through its real entry, on the same model
folder, rows, precision (fp32) and threads, in turn: a repeat runs each once, the next repeat again. The first half of
the steps of a run is warm-up. Medians over the repeats; everything measured goes into one JSON file. With more than
one repeat an untimed run of each comes first, so that all start with the caches that their programs keep. An interrupt
(Ctrl-C) ends it after the last complete repeat. Where distft is not 1.1 times as fast as the fastest of the others (or
everywhere, with --count), the operations of both are counted in a further run.
Axolotl is not measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers_environments
from adapters import Work
from peers_cases import BARS, LEAN, PADDED_ROWS, Case, cells, toy
from peers_figures import CLOSE, Entry, bar_lines, cell_ratio, operation_lines, pairs, table, uneven
from peers_measure import Measured, run, settings_of

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("DISTFT_CACHE") or "~/.cache/distft").expanduser() / "benchmarks"
ROWS = 4_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cells by name")
    parser.add_argument("--bars", action="store_true", help="the cells that have bars")
    parser.add_argument("--table", action="store_true", help="every cell")
    parser.add_argument("--toy", action="store_true", help="one small cell with few steps")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--programs", help="only these, by commas; default: all four")
    parser.add_argument("--every-setting", action="store_true", help="all settings of each program, not its best alone")
    parser.add_argument(
        "--choose",
        default="",
        help="programs, by commas, of which the untimed run tries all settings in every cell, as many steps as the"
        " others take, and the fastest there is measured, in place of the first",
    )
    parser.add_argument("--count", action="store_true", help="count the operations of distft and the fastest other")
    parser.add_argument("--repeats", type=int, help="runs of each; default: 5, for --table and --toy 1")
    parser.add_argument("--steps", type=int, help="steps of a run, half of them warm-up; default: 12, for --table 6")
    parser.add_argument("--threads", type=int, default=2, help="of all processes of a run together; default: 2")
    parser.add_argument("--environments", type=Path, default=CACHE / "environments", help="where environments lie")
    parser.add_argument(
        "--here", action="store_true", help="run all in this Python's environment: enough for distft and Trainer"
    )
    parser.add_argument("--data", type=Path, default=CACHE / "data", help="where rows and models lie")
    parser.add_argument(
        "--torch-index", default="https://download.pytorch.org/whl/cpu", help="where PyTorch's CPU wheels are"
    )
    parser.add_argument("--out", type=Path, help="JSON file; default: peers-<time>.json here")
    return parser.parse_args()


def chosen(given: argparse.Namespace) -> list[Case]:
    """The cells asked for."""
    if given.toy:
        return list(toy().values())
    known = cells()
    unknown = [name for name in given.cases if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; the cells are: {'; '.join(known)}")
    names = list(given.cases)
    if given.bars:
        names += dict.fromkeys(bar.case for bar in BARS)
    if given.table:
        names += known
    return [known[name] for name in dict.fromkeys(names)]


def data_of(case: Case, folder: Path) -> Path:
    """The folder of the case's rows and model, made unless it is there."""
    share = 0.57 if case.supervised == 1.0 else case.supervised
    rows = 200 if case.size == "toy" else ROWS
    here = folder / f"{case.size}-{case.vocabulary}-{round(share * 100)}-{rows}"
    if not (here / "told.json").exists():
        print(f"Making rows and a model in {here}", flush=True)
        make = [
            sys.executable, str(HERE / "rows.py"), str(here), "--size", case.size, "--vocabulary", str(case.vocabulary),
            "--supervised", str(share), "--rows", str(rows),
        ]  # fmt: skip
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    return here


def work_of(case: Case, data: Path, steps: int) -> Work:
    return Work(
        model=data / "model",
        rows=data / "rows.jsonl",
        folder=data,
        lora=case.lora,
        checkpointing=case.checkpointing,
        train_on=case.train_on,
        ranks=case.ranks,
        rows_a_step=PADDED_ROWS,
        steps=steps,
    )


def entrants(case: Case, given: argparse.Namespace) -> list[tuple[str, str]]:
    """Who runs in this cell with which setting."""
    only = given.programs.split(",") if given.programs else list(case.entrants)
    unknown = [name for name in only if name not in case.entrants]
    if unknown:
        raise SystemExit(f"--programs: unknown {', '.join(unknown)}; known: {', '.join(case.entrants)}")
    weighed = not given.table and any(bar.case == case.name for bar in BARS)
    return [
        (program, setting)
        for program, settings in case.entrants.items()
        if program in only
        for setting in settings
        if given.every_setting
        or program in given.choose.split(",")
        or setting == settings[0]
        or (weighed and setting == LEAN.get(program))
    ]


def measure(
    cases: Sequence[Case], given: argparse.Namespace, repeats: int, steps: int
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """All runs, in turn: repeats outermost, then cells, then programs. Also what the untimed run found of settings."""
    plan = [(case, data_of(case, given.data), *entrant) for case in cases for entrant in entrants(case, given)]
    if not given.here:
        for program in dict.fromkeys(program for _, _, program, _ in plan):
            peers_environments.make(program, given.environments, given.torch_index)
    runs: dict[tuple[str, str, str], list[Measured]] = {(case.name, *entrant): [] for case, _, *entrant in plan}
    tried: dict[tuple[str, str, str], float] = {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background
    try:
        for repeat in range(0 if repeats > 1 else 1, repeats + 1):
            for case, data, program, setting in plan:
                measured = once(case, data, program, setting, repeat, given, steps)
                if repeat:
                    runs[case.name, program, setting].append(measured)
                else:
                    tried[case.name, program, setting] = measured.supervised_per_second
            if not repeat:
                kept = left(tried, given.choose.split(","))
                plan = [entry for entry in plan if (entry[0].name, *entry[2:]) in kept]
                runs = {entrant: [] for entrant in runs if entrant in kept}
    except KeyboardInterrupt:
        complete = min(map(len, runs.values()))
        if not complete:
            raise
        print(f"Interrupted: {complete} of {repeats} repeats are complete", flush=True)
        runs = {entrant: found[:complete] for entrant, found in runs.items()}
    entries = [
        Entry(case, program, setting, settings_of(program)[setting], found)
        for (case, program, setting), found in runs.items()
    ]
    names = ("case", "program", "setting", "supervised_per_second")
    return entries, [dict(zip(names, (*entrant, rate), strict=True)) for entrant, rate in tried.items()]


def left(tried: dict[tuple[str, str, str], float], chosen: Sequence[str]) -> set[tuple[str, str, str]]:
    """What is measured after the untimed run: of the programs to choose from, the fastest setting in each cell."""
    fastest: dict[tuple[str, str], tuple[str, str, str]] = {}
    for entrant in sorted(tried, key=lambda entrant: -tried[entrant]):
        fastest.setdefault(entrant[:2], entrant)
    return {entrant for entrant in tried if entrant[1] not in chosen or fastest[entrant[:2]] == entrant}


def once(
    case: Case, data: Path, program: str, setting: str, repeat: int, given: argparse.Namespace, steps: int
) -> Measured:
    """One run; repeat 0 is untimed, and short where nothing is chosen by it."""
    short = repeat == 0 and program not in given.choose.split(",")
    warm_up = 1 if short else steps // 2
    work = work_of(case, data, 2 if short else steps)
    began = time.monotonic()
    measured = run(program, setting, interpreter(program, given), work, given.threads, warm_up)
    print(
        f"{'untimed' if repeat == 0 else f'repeat {repeat}'}  {case.name}  {program} ({setting})  "
        f"{measured.supervised_per_second:,.0f} supervised tokens/s  {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return measured


def count_operations(
    cases: Sequence[Case], given: argparse.Namespace, entries: Sequence[Entry], steps: int
) -> list[tuple[Entry, float, Entry, float]]:
    """Ours and the fastest other with their operations a supervised token, in the cells that are close, or all.

    Over the rows that were measured: attention makes a step of long rows cost more than a step of short ones.
    """
    known, counted = {case.name: case for case in cases}, []
    for ours, rival in pairs(entries, float("inf") if given.count else CLOSE):
        case = known[ours.case]
        work, numbers = work_of(case, data_of(case, given.data), steps), []
        for entry in (ours, rival):
            print(f"counting  {case.name}  {entry.program} ({entry.setting})", flush=True)
            python = interpreter(entry.program, given)
            counted_run = run(entry.program, entry.setting, python, work, given.threads, 1, operations=True)
            assert counted_run.operations is not None
            numbers.append(counted_run.operations)
        counted.append((ours, numbers[0], rival, numbers[1]))
    return counted


def interpreter(program: str, given: argparse.Namespace) -> Path:
    return Path(sys.executable) if given.here else peers_environments.python_of(program, given.environments)


def hardware() -> dict[str, Any]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory": memory, "platform": platform.platform()}


def show(title: str, lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*lines[0], title=title)
    for line in lines[1:]:
        drawn.add_row(*line)
    Console(width=max(160, Console().width)).print(drawn)


def main() -> None:
    given = arguments()
    if given.list:
        print("\n".join(cells()))
        return
    cases = chosen(given)
    if not cases:
        raise SystemExit("nothing to do: give --bars, --table, --toy or the names of cells (--list)")
    repeats = given.repeats or (1 if given.table or given.toy else 5)
    steps = given.steps or (4 if given.toy else 6 if given.table else 12)
    if given.choose and repeats < 2:
        raise SystemExit("--choose needs --repeats of at least 2: with one there is no untimed run")
    if steps < 2:
        raise SystemExit("--steps must be at least 2: half of them are warm-up")
    load, began = os.getloadavg(), time.time()
    entries, tried = measure(cases, given, repeats, steps)
    repeats = min(len(entry.runs) for entry in entries)
    programs = dict.fromkeys(entry.program for entry in entries)
    bars = bar_lines(BARS, entries)
    operations = operation_lines(count_operations(cases, given, entries, steps))
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "load_average_before": load[0],
        "seconds": round(time.time() - began),
        "threads": given.threads,
        "repeats": repeats,
        "steps": steps,
        "warm_up": steps // 2,
        "versions": {program: peers_environments.versions(interpreter(program, given)) for program in programs},
        "rows": {
            case.name: json.loads((data_of(case, given.data) / "told.json").read_text(encoding="utf-8"))
            for case in cases
        },
        "ratios": {case.name: cell_ratio(case.name, entries) for case in cases},
        "uneven": uneven(entries),
        "bars": bars[1:],
        "operations": [dict(zip(operations[0], line, strict=True)) for line in operations[1:]],
        "untimed": tried,
        "entries": [entry.told() for entry in entries],
    }
    out = given.out or Path(f"peers-{time.strftime('%Y%m%d-%H%M%S')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(f"{hardware()['cpu']}, {given.threads} threads, medians of {repeats}", table(entries))
    if len(bars) > 1:
        show("bars", bars)
    if len(operations) > 1:
        show("counted operations: matrix products and attention, forward and backward", operations)
    for line in uneven(entries):
        print(line)
    print(f"Everything measured is in {out}; {report['seconds']} s.")


if __name__ == "__main__":
    main()
