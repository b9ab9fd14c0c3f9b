"""A run's folder: one run at a time, and one run in all."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from loratune.errors import UserError
from loratune.formats.descriptors import BINARY, NO_FOLLOW, read_at, try_lock, write_at

LOCK = ".lock"
RECIPE, REPORT = "recipe.yaml", "report.html"
MADE_BY = "# loratune "  # how the recipe that a run keeps begins
# What a run writes into its folder, and what `clear` therefore deletes.
WRITTEN = (
    *(RECIPE, REPORT, "history.jsonl", "figures/*.png", "tensorboard/events*"),
    *("checkpoints/last*.ckpt", "checkpoints/*step=*.ckpt", "lora.safetensors", "lora-[0-9]*.safetensors"),
    *("learned_embeds.safetensors", "learned_embeds-[0-9]*.safetensors"),
)
# What a run would replace; where no run of ours is, it is somebody's.
RESULTS = ("lora.safetensors", "learned_embeds.safetensors", REPORT, RECIPE, "checkpoints/last.ckpt")
_taken_at: dict[Path, float] = {}
"""When this process took a folder, in seconds since 1970: what lies there from before is an earlier run's."""
_held: dict[Path, tuple[int, list[Path]]] = {}
"""The lock's descriptor of each folder of this process, and the folders created for it, innermost first."""


def take(folder: Path) -> None:
    """Keep a folder for this process until it ends or gives it back, by a lock on a file in it.

    Raises:
        UserError: another process has it, or it cannot be written to.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | BINARY | NO_FOLLOW, 0o644)
    except OSError as error:
        if (folder / LOCK).is_symlink():
            raise UserError(f"{folder / LOCK}: is a symbolic link, where a run has its lock; remove it") from None
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); set trainer.default_root_dir") from None
    if not try_lock(descriptor):
        owner = read_at(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        fault = f"{folder}: a run is under way there ({owner or 'of another process'})"
        raise UserError(f"{fault}; wait for it, stop it, or set trainer.default_root_dir to another folder") from None
    if not _is_still(descriptor, folder / LOCK):  # its owner gave it back, and removed it, between open and lock
        os.close(descriptor)
        return take(folder)
    os.ftruncate(descriptor, 0)
    write_at(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[folder] = descriptor, missing
    _taken_at[folder] = time.time()


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def give_back() -> None:
    """Let other processes have this one's folders; of those in which no run began nothing is left."""
    while _held:
        folder, (descriptor, created) = _held.popitem()
        with suppress(OSError):
            if created and set(folder.iterdir()) == {folder / LOCK}:
                (folder / LOCK).unlink()
            for new in created:
                new.rmdir()
        with suppress(OSError):
            os.close(descriptor)


def holds_a_run(folder: Path) -> bool:
    """Whether a run has begun there: its recipe is written before anything else, and says by what."""
    try:
        with (folder / RECIPE).open("rb") as file:
            return file.read(len(MADE_BY)) == MADE_BY.encode()
    except OSError:
        return False


def refuse_foreign(folder: Path) -> None:
    """Raise UserError where a run would replace a file that no run of loratune's wrote."""
    if holds_a_run(folder):
        return
    for name in RESULTS:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name}: a run would replace it, and the folder holds no run of loratune's; "
                "set trainer.default_root_dir to another folder"
            )


def refuse_another(folder: Path, resumed: Path | None, last: bool) -> None:
    """See that a run does not mix with another.

    Args:
        folder: where the run is to write.
        resumed: the checkpoint that it goes on from, if it does.
        last: whether it was asked to go on from the last one, of which there may be none yet.

    Raises:
        UserError: the folder holds another run, or files of somebody's that a run would replace.
    """
    if last or (resumed is not None and folder.resolve() in resumed.resolve().parents):
        return
    refuse_foreign(folder)
    if not holds_a_run(folder):
        return
    fault = f"{folder}: holds another run" if resumed else f"{folder}: holds a run"
    raise UserError(
        f"{fault}; go on with it by --ckpt_path last, set trainer.default_root_dir to another folder, "
        "or replace it by --run.overwrite true"
    )


def clear(folder: Path) -> None:
    """Delete what an earlier run wrote into a folder that this process has taken since, and nothing else."""
    if not holds_a_run(folder):
        return
    since = _taken_at.get(folder.resolve(), time.time())
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            if path.is_file() and path.stat().st_mtime < since:
                path.unlink()
