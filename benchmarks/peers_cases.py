"""The cells of the comparison with other programs: a name for each, what it changes, and who takes part how."""

from __future__ import annotations

from dataclasses import dataclass, replace

PADDED_ROWS = 12  # the others' rows of a step in a padded layout: about 2,048 real tokens, as in our two bins


@dataclass(frozen=True)
class Case:
    """What is trained in one cell."""

    name: str
    size: str  # a shape of rows.SIZES
    lora: bool = False
    packed: bool = True
    checkpointing: bool = False
    supervised: float = 0.57  # mean share of supervised tokens; 1.0: every token of the same rows
    vocabulary: int = 32_000
    ranks: int = 1

    @property
    def train_on(self) -> str:
        return "all" if self.supervised == 1.0 else "assistant"

    @property
    def entrants(self) -> dict[str, tuple[str, ...]]:
        """The settings of every program in this cell, the best first."""
        return PACKED if self.packed else PADDED


# Trainer has no packing of its own: grouped by length is its best answer to packed rows.
PACKED = {
    "distft": ("packed", "packed, 512 a pass", "packed, 2 a pass"),
    "TRL": ("packed", "packed, 2 a pass", "grouped"),
    "LLaMA-Factory": ("packed", "packed, 2 a pass"),
    "Trainer": ("grouped, 3 a pass", "grouped", "padded"),
}
PADDED = {
    "distft": ("padded, 1,024 a pass", "padded, 512 a pass", "padded"),
    "TRL": ("grouped", "padded"),
    "LLaMA-Factory": ("padded",),
    "Trainer": ("grouped", "grouped, 3 a pass", "padded"),
}


def cells() -> dict[str, Case]:
    """All cells by name, those of the bars first."""
    nano, micro = Case("nano full", "nano"), Case("micro full", "micro")
    nano_lora = replace(nano, name="nano LoRA", lora=True)
    micro_lora = replace(micro, name="micro LoRA", lora=True)
    all_cells = [nano, nano_lora, micro, micro_lora]
    for case in (nano, nano_lora):
        all_cells.append(replace(case, name=f"{case.name}, padded", packed=False))
    for case in (nano, nano_lora, micro_lora):
        all_cells.append(replace(case, name=f"{case.name}, checkpointing", checkpointing=True))
    for case in (nano, nano_lora):
        all_cells.append(replace(case, name=f"{case.name}, 30 % supervised", supervised=0.3))
    all_cells.append(replace(nano, name="nano full, 100 % supervised", supervised=1.0))
    for case in (nano, nano_lora):
        all_cells.append(replace(case, name=f"{case.name}, vocabulary 8k", vocabulary=8_000))
        all_cells.append(replace(case, name=f"{case.name}, vocabulary 128k", vocabulary=128_000))
    all_cells.append(replace(nano, name="nano full, 30 %, 128k", supervised=0.3, vocabulary=128_000))
    for case in (nano, micro_lora):
        all_cells.append(replace(case, name=f"{case.name}, 2 processes", ranks=2))
    return {case.name: case for case in all_cells}


def toy() -> dict[str, Case]:
    """One small cell, to see that the benchmark works."""
    case = Case("toy", "toy", vocabulary=1_000)
    return {case.name: case}


@dataclass(frozen=True)
class Bar:
    """What distft has to reach: at least (or, of what is spent, at most) `ratio` times the best of `against`."""

    case: str
    measure: str
    against: tuple[str, ...]
    ratio: float

    @property
    def at_most(self) -> bool:
        return self.measure != "supervised_per_second"


LEAN = {"distft": "packed, 512 a pass"}
"""Settings that are measured beside the best one in the cells that have bars; the others' best is their leanest."""

EVERYONE = ("TRL", "LLaMA-Factory", "Trainer")
BARS = (
    Bar("nano full", "supervised_per_second", ("LLaMA-Factory",), 2.0),
    Bar("nano full", "supervised_per_second", ("TRL",), 4.0),
    Bar("nano LoRA", "supervised_per_second", ("LLaMA-Factory",), 2.0),
    Bar("nano LoRA", "supervised_per_second", ("TRL",), 4.0),
    Bar("micro full", "supervised_per_second", ("LLaMA-Factory",), 1.5),
    Bar("micro full", "supervised_per_second", ("TRL",), 2.2),
    Bar("nano full", "memory", EVERYONE, 0.55),
    Bar("micro full", "memory", EVERYONE, 0.75),
    Bar("nano full", "start", EVERYONE, 0.6),
)
