"""What commands that make a model and data on the spot share: a folder of their own, rows, a training step."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rlhf.errors import ConfigError
from rlhf.terminal import tell
from rlhf.types import Json


def clear_folder(folder: Path, marker: str, command: str) -> None:
    """Make an empty `folder`. An earlier one that `command` made, which the file `marker` in it shows, is replaced.

    Raises:
        ConfigError: the folder exists and holds something else.
    """
    if folder.exists():
        if not (folder / marker).is_file():
            raise ConfigError(
                f"{command}: {folder} exists and was not made by this command. Choose another with --folder."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_rows(path: Path, rows: Sequence[Mapping[str, Json]]) -> None:
    """One JSON object on each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(path: Path, settings: Mapping[str, Json]) -> None:
    """A config file, as a user would write it."""
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def train_command(method: str, config: Path) -> list[str]:
    """The words of `rlhf train METHOD CONFIG`."""
    return ["rlhf", "train", method, str(config)]


def run_command(words: Sequence[str], command: str) -> int:
    """Run `rlhf ...` in a process of its own. Returns its exit code; if it failed, says how to run it again, for
    `command`."""
    code = subprocess.run([sys.executable, "-m", "rlhf.cli.main", *words[1:]], check=False).returncode
    if code:
        tell([f"rlhf: {command}: a step ended with code {code}; again: {shlex.join(words)}"])
    return code
