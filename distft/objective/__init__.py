"""What is learned from a row: how it is encoded, and how its loss is taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.schema import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distft.data.encoder import Encoder


def make_encoder(run: Run, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Encoder:
    """The encoder of the run's objective; only its module is imported. `folder` holds the settled tokenizer.

    Raises:
        UserMistake: the tokenizer lacks what the objective needs.
    """
    if run.objective.name == "lm":
        from distft.objective import lm

        return lm.make_encoder(run, tokenizer, folder)
    from distft.objective import sft

    return sft.make_encoder(run, tokenizer, folder)
