"""TensorBoard event files under <run>/tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoardTracker:
    """Scalars by split, samples as text. What an abandoned attempt wrote past `resumed_step` is purged on display."""

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        self.folder, self.resumed_step = run_dir / "tensorboard", resumed_step

    def load(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer_class = SummaryWriter

    def start(self) -> None:
        purge_step = None if self.resumed_step is None else self.resumed_step + 1
        self.writer = self.writer_class(str(self.folder), purge_step=purge_step)

    def metrics(self, split: str, step: int, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"{split}/{name}", value, step)
        self.writer.flush()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            text = "\n\n".join(f"**{name}**\n\n```\n{value}\n```" for name, value in row.items())
            self.writer.add_text(f"eval/samples/{number}", text, step)
        self.writer.flush()

    def go_back(self, step: int) -> None:
        self.writer.close()
        self.resumed_step = step
        self.start()

    def summary(self, values: dict[str, Any]) -> None:
        """Nothing: TensorBoard shows curves alone."""

    def alert(self, title: str, text: str, level: str) -> None:
        self.writer.add_text("alert", f"{level}: {title}\n\n{text}")

    def abandon(self) -> None:
        """Nothing: it has no process of its own."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self.writer.add_text("status", status)
        self.writer.close()
