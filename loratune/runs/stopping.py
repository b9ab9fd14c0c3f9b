"""SIGTERM, Ctrl-C and a batch system's warning: save where the run stands, say so, leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L


class Stopped(SystemExit):
    """A signal ended the run; the exit code is 128 + its number, as shells have it."""


class Signals:
    """Which signal asked the run to stop, if one did.

    Before training a signal stops at once: nothing is lost, as what is encoded is on disk. In training the step under
    way, and a validation, are ended first; a second signal does not wait.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.waits = False
        self._process = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on signals are taken here; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.asked, self.waits, self._process = 0, False, os.getpid()
        in_batch_system = "SLURM_JOB_ID" in os.environ
        for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1, signal.SIGUSR2) if in_batch_system else ())):
            before = signal.signal(number, self._take)
            self._before.setdefault(number, before)

    def forget(self) -> None:
        """Signals do again what they did before."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before, self.asked, self.waits = {}, 0, False

    def _take(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that loads batches: it goes when the run goes
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.waits or self.asked:
            leave(number, "")
        self.asked = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more leaves at once", file=sys.stderr)

    def stop(self, trainer: L.Trainer, saved: Path | None) -> None:
        """Leave, when the run was saved.

        Raises:
            Stopped: always.
        """
        number = self.asked or signal.SIGTERM  # of another process, where it is 0 here
        message = f"saved to {saved}" if saved else "the last checkpoint could not be written; the one before it stays"
        message = f"step {trainer.global_step}: {message}; --ckpt_path last goes on from there"
        if not trainer.is_global_zero:
            raise Stopped(0)  # a launcher would take another code for a crash, and kill the first process
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            message += requeue()
        leave(number, message)


def leave(number: int, message: str) -> None:
    """Say why, and raise Stopped."""
    message = message or "stopped; what is encoded and saved stays, and the same command with --ckpt_path last goes on"
    print(f"loratune: {signal.Signals(number).name}: {message}", file=sys.stderr, flush=True)
    raise Stopped(128 + number)


def requeue() -> str:
    """Ask SLURM to queue this job again; returns what to say of it."""
    job, command = os.environ.get("SLURM_JOB_ID", ""), shutil.which("scontrol")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job or command is None:
        return ""
    done = subprocess.run([command, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"; scontrol requeue {job} failed ({' '.join(done.stderr.split())}), queue it again yourself"
    return f"; job {job} is queued again"


SIGNALS = Signals()
"""Of this process."""
