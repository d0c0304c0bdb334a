"""Links in folders from elsewhere: one that leaves its folder could make a file of this machine part of a model."""

from __future__ import annotations

import re
from pathlib import Path

from distft.errors import UserMistake

BLOB = re.compile(r"(models|datasets)--[^/]+/blobs/[0-9a-f]{40,64}$")
"""Where the snapshots of the Hub's cache lead (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""


def refuse_links(folder: Path) -> None:
    """Every link directly in `folder` stays in it, or leads to a blob of the Hub's cache.

    Raises:
        UserMistake: one leads elsewhere.
    """
    home = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.is_symlink():
            continue
        target = path.resolve()
        if not target.is_relative_to(home) and not BLOB.search(target.as_posix()):
            raise UserMistake(
                f"{path} is a link that leaves its folder, to {target}. It is refused: copy the file to where the link "
                "is, or give the folder that it lies in."
            )
