"""Where everything that can be made again lies: tokenised data, the tiny model, collected rows."""

from __future__ import annotations

import os
from pathlib import Path

from distft.config.schema import Data


def cache_folder(data: Data) -> Path:
    """`data.cache_dir`, else $DISTFT_CACHE, else ~/.cache/distft."""
    return Path(data.cache_dir or os.environ.get("DISTFT_CACHE") or "~/.cache/distft").expanduser().absolute()
