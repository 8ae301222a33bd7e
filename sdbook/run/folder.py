"""The folder of a run: who has it, what was left in it, and what if it is full."""

import errno
import os
import platform
import re
import shutil
import time
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

from filelock import FileLock, Timeout

from .processes import is_main_process, this_process
from .progress import sigterm_as_ctrl_c

LOCK, HOLDER = ".lock", ".holder"
HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp")  # see `write_atomically`
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ours = set()  # folders that this process holds, with its number: it may have forked


@contextmanager
def hold(folder: Path):
    """Have a folder for this process alone; BlockingIOError names who has it now.

    The operating system lets go of it when the process ends, however it does.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"output_dir {folder} is no folder; choose another output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=10 if has_ended(read_holder(holder)) else 0)
    except Timeout:
        raise BlockingIOError(
            f"another training has {folder} now ({read_holder(holder)}); wait until "
            "it is done, or stop it, or choose another output_dir"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M")
        holder.write_text(f"process {os.getpid()} on {platform.node()}, since {since}")
        remove_half_written(folder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def read_holder(holder: Path) -> str:
    """Who has a folder, as it wrote itself."""
    try:
        return holder.read_text(errors="replace")
    except FileNotFoundError:
        return "it does not say which process"


def has_ended(who: str) -> bool:
    """Is the holder no more? Its workers, which hold with it, then end in seconds."""
    found = re.match(r"process (\d+) on (.*), since", who)
    if not found or found[2] != platform.node() or os.name != "posix":
        return False
    try:
        os.kill(int(found[1]), 0)  # no signal: only asks
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def remove_half_written(folder: Path, depth: int = 2) -> None:
    """Remove what runs that were killed had begun to write, but not other runs' files.

    They are in the folder and as many folders below it as `depth` says.
    """
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        if HALF_WRITTEN.fullmatch(entry.name):
            shutil.rmtree(entry) if is_folder else os.unlink(entry)
        elif is_folder and depth and not os.path.exists(os.path.join(entry, LOCK)):
            remove_half_written(Path(entry), depth - 1)


def checkpoint_folder(output_dir: str | Path) -> Path:
    """The folder of a run's checkpoints, each named by `checkpoint_name`."""
    return Path(output_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """What the checkpoint after so many steps is called; names sort as steps do."""
    return f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of them, the oldest first; whole ones or not."""
    return sorted(folder.glob("step-*.pt"))


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The last checkpoint of the run in this folder."""
    return max(list_checkpoints(checkpoint_folder(output_dir)), default=None)


def owns_output_dir(training):
    """Let a function of a config, and more, have `output_dir` to itself.

    While it runs, another process that wants to train there is refused. With
    `dry_run` nothing is held. Ctrl-C and SIGTERM before or after the steps, and a full
    disk, end with a message that says how to go on.
    """

    @wraps(training)
    def alone(config, *given, **named):
        folder = Path(config.output_dir)
        mine = os.getpid(), os.path.realpath(folder)
        if config.dry_run or mine in ours:
            return training(config, *given, **named)
        with hold(folder) if is_main_process() else nullcontext():
            this_process().wait_for_everyone()  # in vain, if the main one is refused
            ours.add(mine)
            try:
                with sigterm_as_ctrl_c():
                    return training(config, *given, **named)
            except KeyboardInterrupt as error:
                raise (error if error.args else stopped(folder)) from None
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise no_room(error, folder) from error
            finally:
                ours.remove(mine)

    return alone


def stopped(folder: Path) -> KeyboardInterrupt:
    """The interruption of a run that wrote no checkpoint because of it."""
    if last := newest_checkpoint(folder):
        return KeyboardInterrupt(f"at once; the same command goes on from {last}")
    return KeyboardInterrupt(
        f"before the first checkpoint; the same command begins again, with what "
        f"{folder} holds already"
    )


def no_room(error: OSError, folder: Path) -> OSError:
    """What to do about a disk that is full."""
    what = f"{error.filename}: " * bool(error.filename) + error.strerror
    last = newest_checkpoint(folder) or f"what {folder} holds already"
    return OSError(f"{what}; the same command then goes on from {last}")
