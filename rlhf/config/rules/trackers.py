"""What trackers need of a machine: their package, and a key."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rlhf.config.problems import Problem
from rlhf.config.run import TRACKER_PACKAGES, LogSection


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def tracker_problems(
    section: LogSection, environ: Mapping[str, str], installed: Callable[[str], bool] = is_installed
) -> Iterator[Problem]:
    """Packages and keys that are missing for the trackers that `section` sets."""
    for name, package in TRACKER_PACKAGES.items():
        if dict(section)[name] is not None and not installed(package):
            text = f"{package} is not installed. Run `pip install {package}`."
            yield Problem(keys=(f"log.{name}",), text=text)
    offline = environ.get("WANDB_MODE") in {"offline", "disabled"}
    logged_in = "WANDB_API_KEY" in environ or (Path.home() / ".netrc").is_file()
    if section.wandb_project is not None and not offline and not logged_in:
        text = "environment variable WANDB_API_KEY is not set. Export it, or set WANDB_MODE=offline."
        yield Problem(keys=("log.wandb_project",), text=text)
