"""One run at a time in a folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._files import check_writable


@contextlib.contextmanager
def held(root: Path, suffix: str) -> Iterator[None]:
    """Holds a folder, or a shard's part of it, while a block runs.

    The system lets go of it when the process ends, however it ends. On systems and file systems
    without locks nothing is held.

    **Raises:** `BlockingIOError`, which names the holder, where another run holds it.
    """
    file = _locked(root, root / f".run{suffix}.lock")
    if file is None:
        yield
        return
    with file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
        file.flush()
        try:
            yield
        finally:
            # Before the lock goes: nobody can then hold a file that is deleted later.
            Path(file.name).unlink(missing_ok=True)


def _locked(root: Path, path: Path) -> Any:
    """Returns the locked file, or None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    check_writable(path)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                holder = file.read(200) or "another process"
            raise BlockingIOError(
                f"{root} is being written to by {holder}: wait for it, or name another folder, "
                "or give each run a `shard` of its own."
            ) from error
        except OSError:
            file.close()
            return None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        # Its last holder has just deleted it.
        file.close()


__all__ = ["held"]
