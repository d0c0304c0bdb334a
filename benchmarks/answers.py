"""How soon a typing mistake, a broken rule and `--help` are answered, in seconds of a whole `python train.py`.

    python benchmarks/answers.py

The bar is a second. Exit code 1 where the median of an answer takes longer.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from timing import ROOT, arguments_of, interleaved, table, write_record

COMMANDS = {
    "unknown key": ["optim.lrr=1"],
    "broken rule": ["batch.micro_size=99"],
    "help": ["--help"],
}
BAR = 1.0  # s


def answer(words: list[str]) -> None:
    """One process, from its start to its end."""
    ended = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if words == ["--help"] else 2), ended.stderr


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    calls = {name: partial(answer, words) for name, words in COMMANDS.items()}
    taken = interleaved(calls, 1 if arguments.toy else arguments.repeats)
    rows = [{"answer": name, "seconds": round(seconds.wall, 2)} for name, seconds in taken.items()]
    print(table(rows))
    write_record(arguments.out, bar=BAR, rows=rows)
    if not arguments.toy and any(row["seconds"] >= BAR for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
