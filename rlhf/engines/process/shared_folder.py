"""Whether this process can write to a folder that processes on several nodes share."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory


def folder_problem(folder: Path, marker: str, room: int) -> str:
    """What keeps this process from writing `room` bytes to `folder`, in which another process has made the file
    `marker`; empty if nothing does."""
    try:
        if not (folder / marker).exists():
            return "it does not see what the driver writes there: name a folder that all nodes share"
        with TemporaryDirectory(dir=folder, prefix=".rlhf-"):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"it cannot write there ({error.strerror or error})"
    if free < room:
        return f"{free / 1e6:.3g} MB are free there, {room / 1e6:.3g} MB or more are needed"
    return ""
