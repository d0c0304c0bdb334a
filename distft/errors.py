"""The few ways a command ends, each with the exit code a script can rely on."""

from __future__ import annotations

DONE = 0
BUG = 1
USER_MISTAKE = 2
NEGATIVE_VERDICT = 3
STOPPED_BY_GUARD = 4
STALLED = 5
ENDED_AT_ONCE = 137  # 128 + SIGKILL, as a shell tells it
SAVED_AFTER_SIGNAL = 143  # 128 + SIGTERM


class Stop(Exception):
    """Base of every deliberate end; `exit_code` is what the process returns, the message is all that is printed."""

    exit_code = BUG
    status = "failed"  # in result.json


class UserMistake(Stop):
    """Something the user can put right. The message names the knob and gives the cure."""

    exit_code = USER_MISTAKE


class Mistakes(UserMistake):
    """Several mistakes found at once, told in one message."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(message)


class NegativeVerdict(Stop):
    """A check, a verification or a plan that ran well and says no."""

    exit_code = NEGATIVE_VERDICT


class GuardStop(Stop):
    """Training was stopped by a guard: the numbers had become useless."""

    exit_code = STOPPED_BY_GUARD
    status = "stopped_by_guard"


class Stalled(Stop):
    """A rank did not move within `guard.stall_seconds`."""

    exit_code = STALLED
    status = "stalled"


class SignalStop(Stop):
    """A signal asked the run to end; a checkpoint was written first. `by_slurm`: as Slurm asks before it ends a job."""

    exit_code = SAVED_AFTER_SIGNAL
    status = "saved_after_signal"

    def __init__(self, message: str, by_slurm: bool = False) -> None:
        super().__init__(message)
        self.by_slurm = by_slurm


class DeadlineStop(SignalStop):
    """`launch.deadline` or the end of the Slurm job was near; a checkpoint was written first."""

    status = "saved_before_deadline"
