"""What preflight found out about a run: written once into its folder, read by every rank."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

PREPARED = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """`prepared.json` of the run folder."""

    model_folder: str
    tokenizer_folder: str  # the tokenizer with the chat template settled; goes into the final folder
    data_folder: str
    data_hash: str
    packed: bool
    attention: str  # implementation handed to transformers
    notes: tuple[str, ...]  # what the user should know, said when training starts

    def write(self, run_dir: Path) -> None:
        (run_dir / PREPARED).write_text(json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def read(cls, run_dir: Path) -> Prepared:
        values = json.loads((run_dir / PREPARED).read_text())
        return cls(**{**values, "notes": tuple(values["notes"])})
