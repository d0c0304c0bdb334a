"""How long a training step waits for a checkpoint: `python benchmarks/checkpointing.py [--parameters 100] [--toy]`.

Weights and AdamW's moments of a model of so many million parameters, on one rank, are saved at once
(`checkpoint.background=false`) and behind training (`true`), in turns into a temporary folder. *waits* is what the
step that saves loses; *complete* is when the checkpoint is on the disk, synced and read back. The first save of each
way, which is also compared bit for bit, is not counted. The ratio of the two waits is printed last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import Size, lay_out, run_of
from timing import arguments_of, table, write_record

from distft.checkpoint.behind import WriteBehind
from distft.checkpoint.state import TrainState
from distft.world import join, leave

INTERMEDIATE = 3  # times hidden


def size_of(millions: float) -> Size:
    """A Llama of about so many parameters, an eighth of them in the embedding."""
    if millions < 1:
        return Size(32, 2, 2, 1, 96, 256)
    hidden, vocabulary = 768, int(millions * 1e6 / 8 / 768)
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * INTERMEDIATE * hidden * hidden
    layers = max(1, round(millions * 1e6 * 7 / 8 / layer))
    return Size(hidden, layers, 12, 6, INTERMEDIATE * hidden, vocabulary)


def main() -> None:
    parser: argparse.ArgumentParser = arguments_of(__doc__)
    parser.add_argument("--parameters", type=float, default=100, help="in millions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="write there (default: the folder of temporary files)")
    given = parser.parse_args()
    repeats, millions = (1, 0.1) if given.toy else (given.repeats, given.parameters)
    world = join()
    run = run_of("ddp", "full")
    strategy = lay_out(run, world, size_of(millions)).strategy
    num_bytes = sum(4 * shard.tensor.numel() for shard in strategy.shards())
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        writers = {}
        for behind in taken:
            run_here = run_of("ddp", "full")
            run_here.checkpoint.background, run_here.checkpoint.keep = behind, 1
            writers[behind] = WriteBehind(run_here, Path(folder) / str(behind), strategy, world)
        for step in range(1, repeats + 2):
            for behind, checkpoints in writers.items():
                started = time.perf_counter()
                checkpoints.save(TrainState(step))
                waited = time.perf_counter() - started
                checkpoints.wait()
                if step > 1:
                    taken[behind].append((waited, time.perf_counter() - started))
    rows = [
        {
            "way": "behind training" if behind else "at once",
            "waits s": round(statistics.median(waits for waits, _ in several), 4),
            "complete s": round(statistics.median(complete for _, complete in several), 4),
        }
        for behind, several in taken.items()
    ]
    print(table(rows))
    print(f"{num_bytes / 12e6:.1f} million parameters, {num_bytes / 2**20:.0f} MiB a checkpoint, {repeats} repeats")
    share = statistics.median(waits for waits, _ in taken[True]) / statistics.median(waits for waits, _ in taken[False])
    print(f"behind training a step waits {share:.1%} of what it waits for a checkpoint that is written at once")
    numbers = {str(way): all_ for way, all_ in taken.items()}
    write_record(given.out, rows=rows, num_bytes=num_bytes, share=share, taken=numbers)
    leave()


if __name__ == "__main__":
    sys.exit(main())
