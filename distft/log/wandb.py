"""Weights & Biases. Offline by itself where there is no key; the same W&B run goes on when training resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import netrc
import os
import secrets
import string
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from distft.config.redact import redact, redact_tree
from distft.config.schema import Run
from distft.heartbeat import this_machine
from distft.log.last_word import note_session
from distft.log.system import Gathering

INIT_SECONDS = 30.0  # to reach the server; after that the run is recorded offline
SERVICE, SERVICE_SECONDS = "wandb-core", 5.0  # W&B's process, and what it gets to end once a run has finished
FLUSH_SECONDS = 2.0  # between writes of W&B's own record, all of which it would keep in memory until the end
TABLE_SECONDS = 5.0  # that the end of a run waits for a table on its way
LONGEST_TITLE = 63  # characters of an alert's title that W&B takes
PREEMPTED = ("saved_after_signal", "saved_before_deadline")
FINISH_SECONDS = 50.0  # to send what is left at the end; `wandb sync` sends the rest


def new_id() -> str:
    """An id as W&B makes them: eight letters and digits. Made here, so that a checkpoint knows it at once."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def display_name(run: Run, run_dir: Path) -> str:
    """The run folder's name; a job of a sweep, whose folder is only numbered, adds the sweep's."""
    if run.run.name:
        return f"{run.run.name}-{run_dir.name}" if run_dir.name.isdigit() else run.run.name
    return f"{run_dir.parent.name}-{run_dir.name}" if run_dir.name.isdigit() else run_dir.name


OFFLINE = ("offline", "dryrun")


def key_of(settings: Any) -> str | None:
    """The key that W&B would take without asking: of the environment, its settings or a netrc file."""
    key = os.environ.get("WANDB_API_KEY") or settings.api_key
    if key:
        return str(key)
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        entry = netrc.netrc(str(path)).authenticators(urlsplit(settings.base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def credentials() -> tuple[str | None, str | None]:
    """The server that W&B would send records to (None: it is switched off or offline), and the key for it."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    address = None if settings.mode in ("disabled", *OFFLINE) else str(settings.base_url).rstrip("/")
    return address, key_of(settings)


def within(seconds: float, work: Callable[[], Any]) -> None:
    """Let it have this long; what it raises, or does later, concerns nobody."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, name="W&B, bounded", daemon=True)
    thread.start()
    thread.join(seconds)


class WandbTracker:
    """One W&B run. Its step axis is our own, so that a resumed run continues its curves where they left off.

    `num_before`: at least as many records as earlier sessions of this W&B run wrote; None: it has none. W&B numbers
    records itself and drops those whose number is not new. Online it knows where an earlier session ended; offline it
    starts at 0 again, and `wandb sync` would lose the second session: there we number them. `system`: what the ranks
    publish of their processes and devices, sent with the training records.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        facts: dict[str, Any],
        wandb_id: str,
        num_before: int | None,
        say: Callable[[str], None],
        system: Gathering | None = None,
    ) -> None:
        self.run, self.run_dir, self.facts, self.id = run, run_dir, facts, wandb_id
        self.system, self.name = system, display_name(run, run_dir)
        self.num_records, self.say = num_before, say
        self.offline = True
        self.set_here: list[str] = []
        self.wandb: Any = None
        self.table: threading.Thread | None = None  # that sends the newest table

    def load(self) -> None:
        """Settle the environment, then import."""
        data = str(self.run_dir / "wandb" / "data")  # by itself W&B would write under the home directory
        for name, value in {
            "WANDB_DATA_DIR": data,
            "WANDB_CACHE_DIR": data,
            "WANDB_ERROR_REPORTING": "false",  # else W&B's own errors go to a third party, and ending waits for that
        }.items():
            if name not in os.environ:
                os.environ[name] = value
                self.set_here.append(name)
        import wandb

        self.wandb = wandb

    def start(self) -> None:
        """Open the run: online if there is a key and the server answers, else offline."""
        self.wandb.setup(settings=self.wandb.Settings(silent=True, console="off"))
        self.offline = not self.has_key()
        try:
            self.open()
        except Exception as error:  # no network, a key that is not accepted, a server that is down
            if self.offline:
                raise
            self.offline = True
            self.wandb.teardown()
            self.open()
            reason = redact(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
            self.say(f"W&B could not be reached ({reason}); this run is recorded offline.")
        self.session.define_metric("step", hidden=True)
        self.session.define_metric("train/*", step_metric="step")
        self.session.define_metric("eval/*", step_metric="step")
        self.session.define_metric("system/*", step_metric="step")
        self.note(ended=False)
        if self.offline:
            self.say(f"W&B records offline. To send it: wandb sync {self.session.settings.sync_dir}")
        elif self.session.url:
            self.say(f"W&B: {self.session.url}")

    def has_key(self) -> bool:
        """Whether W&B would find credentials without asking. It must never ask: ranks have no one to ask."""
        settings = self.wandb.setup().settings
        if settings.mode == "disabled":
            return True  # nothing will be sent nor asked
        if settings.mode in OFFLINE:
            return False
        return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or key_of(settings))

    def open(self) -> None:
        log = self.run.log
        quiet: dict[str, Any] = {"silent": True, "console": "off", "disable_code": True}
        quiet["x_transaction_log_flush_interval"] = FLUSH_SECONDS
        if redact_tree(sys.argv) != sys.argv:
            quiet["x_disable_meta"] = True  # W&B's metadata holds the command line
        if self.offline:
            quiet["mode"] = "offline"
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            quiet["init_timeout"] = INIT_SECONDS
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            quiet["finish_timeout"] = FINISH_SECONDS
        self.session = self.wandb.init(
            project=log.project,
            name=self.name,
            id=self.id,
            resume=None if self.num_records is None else "allow",
            group=log.group,
            tags=list(log.tags) or None,
            dir=self.run_dir,
            config={**redact_tree(dataclasses.asdict(self.run)), **self.facts},
            settings=self.wandb.Settings(**quiet),
        )

    def note(self, ended: bool) -> None:
        """For who has to speak about this run when it cannot (last_word.py), and for who takes it up again."""
        told = {"alerts": list(self.run.log.alerts), "process": os.getpid(), "machine": this_machine()}
        note_session(self.run_dir, {"id": self.id, "ended": ended, **told})

    def metrics(self, split: str, step: int, record: dict[str, Any]) -> None:
        values = {f"{split}/{name}": value for name, value in record.items()}
        self.record({"step": step, **values, **(self.system.fresh() if self.system and split == "train" else {})})

    def record(self, values: dict[str, Any]) -> None:
        if self.num_records is None or not self.offline:
            self.session.log(values)
        else:
            self.session.log(values, step=self.num_records)
            self.num_records += 1

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of its own for every evaluation, under one key: W&B shows them side by side by step.

        W&B asks its server before it takes a table, again and again where that does not answer. So a table has a
        thread of its own, for which no metric waits; while one is on its way the next is left out.
        """
        columns = ["step", *rows[0]]
        table = self.wandb.Table(columns=columns, data=[[step, *row.values()] for row in rows])
        values = {"step": step, "eval/samples": table}
        if self.offline:
            self.record(values)
        elif self.table is None or not self.table.is_alive():
            self.table = threading.Thread(target=self.send_table, args=(values,), name="W&B table", daemon=True)
            self.table.start()

    def abandon(self) -> None:
        """End W&B's own process; what it has written lies on the disk, for `wandb sync`."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == SERVICE:
                    child.kill()
        if self.wandb is not None:
            within(SERVICE_SECONDS, self.wandb.teardown)  # else it is waited for when this process ends

    def send_table(self, values: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # samples.jsonl has it
            self.record(values)

    def go_back(self, step: int) -> None:
        """Nothing: W&B keeps all records, and along our step axis the later ones are drawn over the earlier."""

    def summary(self, values: dict[str, Any]) -> None:
        """At once: a run that is killed keeps what it had."""
        self.session.summary.update(values)

    def alert(self, title: str, text: str, level: str) -> None:
        self.session.alert(title[:LONGEST_TITLE], redact(text), level)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self.session.summary.update({"status": status, **summary})
        if status in PREEMPTED:
            self.session.mark_preempting()  # shown as interrupted, not as failed: the same run goes on later
        self.note(ended=True)
        if self.table is not None:
            self.table.join(TABLE_SECONDS)
        exit_code = 0 if status in ("done", "early_stopped", "pruned") else 1
        # About a dead server W&B's process would go on for hours, and W&B waits for it whatever finish_timeout says.
        longest = self.session.settings.finish_timeout or FINISH_SECONDS
        within(longest + SERVICE_SECONDS, partial(self.session.finish, exit_code=exit_code))
        within(SERVICE_SECONDS, self.wandb.teardown)
        self.abandon()
        for name in self.set_here:
            os.environ.pop(name, None)
