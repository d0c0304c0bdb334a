"""Weights & Biases. Offline by itself where there is no key; the same W&B run goes on when training resumes."""

from __future__ import annotations

import dataclasses
import netrc
import os
import secrets
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distft.config.redact import redact, redact_tree
from distft.config.schema import Run

INIT_SECONDS = 30.0  # to reach the server; after that the run is recorded offline
FINISH_SECONDS = 60.0  # to send what is left at the end; `wandb sync` sends the rest


def new_id() -> str:
    """An id as W&B makes them: eight letters and digits. Made here, so that a checkpoint knows it at once."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def display_name(run: Run, run_dir: Path) -> str:
    """The run folder's name; a job of a sweep, whose folder is only numbered, adds the sweep's."""
    if run.run.name:
        return f"{run.run.name}-{run_dir.name}" if run_dir.name.isdigit() else run.run.name
    return f"{run_dir.parent.name}-{run_dir.name}" if run_dir.name.isdigit() else run_dir.name


class WandbTracker:
    """One W&B run. Its step axis is our own, so that a resumed run continues its curves where they left off."""

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        facts: dict[str, Any],
        wandb_id: str,
        resumed: bool,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.run_dir, self.facts, self.id = run, run_dir, facts, wandb_id
        self.resumed, self.say = resumed, say
        self.offline = True
        self.set_here: list[str] = []

    def start(self) -> None:
        """Open the run: online if there is a key and the server answers, else offline."""
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # W&B's own places are under the home directory
            if name not in os.environ:
                os.environ[name] = str(self.run_dir / "wandb" / "data")
                self.set_here.append(name)
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True, console="off"))
        self.offline = not self.has_key(wandb)
        try:
            self.open(wandb, self.offline)
        except Exception as error:  # no network, a key that is not accepted, a server that is down
            if self.offline:
                raise
            self.offline = True
            wandb.teardown()
            self.open(wandb, offline=True)
            reason = redact(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
            self.say(f"W&B could not be reached ({reason}); this run is recorded offline.")
        self.wandb.define_metric("step", hidden=True)
        self.wandb.define_metric("train/*", step_metric="step")
        self.wandb.define_metric("eval/*", step_metric="step")
        if self.offline:
            self.say(f"W&B records offline. To send it: wandb sync {self.wandb.settings.sync_dir}")
        elif self.wandb.url:
            self.say(f"W&B: {self.wandb.url}")

    def has_key(self, wandb: Any) -> bool:
        """Whether W&B would find credentials without asking. It must never ask: ranks have no one to ask."""
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun"):
            return False
        if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
            return True
        path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        try:
            return bool(netrc.netrc(str(path)).authenticators(urlsplit(settings.base_url).netloc))
        except (OSError, netrc.NetrcParseError):
            return False

    def open(self, wandb: Any, offline: bool) -> None:
        log = self.run.log
        quiet: dict[str, Any] = {"silent": True, "console": "off", "disable_code": True}
        if redact_tree(sys.argv) != sys.argv:
            quiet["x_disable_meta"] = True  # W&B's metadata holds the command line
        if offline:
            quiet["mode"] = "offline"
        self.wandb = wandb.init(
            project=log.project,
            name=display_name(self.run, self.run_dir),
            id=self.id,
            resume="allow" if self.resumed else None,
            group=log.group,
            tags=list(log.tags) or None,
            dir=self.run_dir,
            config={**redact_tree(dataclasses.asdict(self.run)), **self.facts},
            settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, **quiet),
        )

    def metrics(self, split: str, step: int, record: dict[str, Any]) -> None:
        self.wandb.log({"step": step, **{f"{split}/{name}": value for name, value in record.items()}})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of its own for every evaluation, under one key: W&B shows them side by side by step."""
        import wandb

        columns = ["step", *rows[0]]
        table = wandb.Table(columns=columns, data=[[step, *row.values()] for row in rows])
        self.wandb.log({"step": step, "eval/samples": table})

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self.wandb.summary.update({"status": status, **summary})
        self.wandb.finish(exit_code=0 if status in ("done", "early_stopped", "pruned") else 1)
        for name in self.set_here:
            os.environ.pop(name, None)
