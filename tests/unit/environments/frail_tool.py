"""A tool whose module can be imported as long as the file that FRAIL_TOOL names is not there."""

import os
from pathlib import Path

if Path(os.environ.get("FRAIL_TOOL", "/nowhere")).exists():
    raise ImportError("device busy")


def die_for_good() -> None:
    """End the process, and let no other one start."""
    Path(os.environ["FRAIL_TOOL"]).touch()
    os._exit(3)
