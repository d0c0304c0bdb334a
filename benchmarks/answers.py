"""How soon a typing mistake, a broken rule and `--help` are answered, in seconds of a whole `python train.py`.

    python benchmarks/answers.py

The bar is a second. Exit code 1 where the median of an answer takes longer.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from measure import ROOT, Seconds, arguments_of, table, write_record

COMMANDS = {
    "unknown key": ["optim.lrr=1"],
    "broken rule": ["batch.micro_size=99"],
    "help": ["--help"],
}
BAR = 1.0  # s


def answered(words: list[str]) -> Seconds:
    """One process, from its start to its end."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if words == ["--help"] else 2), ended.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(time.perf_counter() - wall, busy)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    repeats = 1 if arguments.toy else arguments.repeats
    taken: dict[str, list[Seconds]] = {name: [] for name in COMMANDS}
    for number in range(1 + repeats):  # the first compiles what was never imported before
        for name, words in COMMANDS.items():
            seconds = answered(words)
            if number:
                taken[name].append(seconds)
    rows = [
        {
            "answer": name,
            "seconds": round(statistics.median(one.wall for one in several), 2),
            "of the processor": round(statistics.median(one.busy for one in several), 2),
        }
        for name, several in taken.items()
    ]
    print(table(rows))
    write_record(arguments.out, repeats=repeats, bar=BAR, rows=rows)
    if not arguments.toy and any(row["seconds"] >= BAR for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
