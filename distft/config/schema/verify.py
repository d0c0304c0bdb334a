from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Verification:
    """How a saved folder is looked over: by a run at its end, and by `distft verify`."""

    max_memory: float | None = None
    """GiB of host memory that a plain model may take when its logits are compared with the recorded ones; where it
    needs more, they are left out and it is said. null: half of what the machine has left. Hashes, names, shapes and
    values need none: they pass through memory a piece at a time."""


@dataclass
class Verify:
    """Everything that decides how `distft verify <folder>` looks a folder over."""

    verify: Verification = field(default_factory=Verification)

    trust_remote_code: bool = False
    """Run Python that lies in the model's folder. Only for folders you have read."""
