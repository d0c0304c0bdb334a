"""Draw the loss curves of run folders: `python benchmarks/curves.py out.png runs/a runs/b …`.

Lines: training loss (token mean of each logged step); dots: evaluation loss. Needs matplotlib (the `dev` extra).
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path


def points(folder: Path, split: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's records of one split (train or eval)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [record for record in records if record["split"] == split]
    return [record["step"] for record in chosen], [float(record["loss"]) for record in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    for folder, style in zip(arguments.runs, itertools.cycle(["-", "--", ":"])):  # equal curves stay visible
        (line,) = axes.plot(*points(folder, "train"), style, linewidth=1.4, label=folder.name)
        axes.plot(*points(folder, "eval"), "o", color=line.get_color(), markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token (dots: evaluation)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
