"""Which model a name stands for: a folder, a hub name, or the folder of a run."""

import json
from pathlib import Path

from rlhf.engines.models.hub import require_found
from rlhf.errors import ModelError


def find_model(name: str) -> str:
    """The model to load. The folder of a run stands for the model that it trained.

    Raises:
        ModelError: there is no such model, and it cannot be downloaded; or the run has no model yet.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        require_found(name, "model")
        return name
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if (folder / "status.json").is_file():
        raise ModelError(f"model: the run {name} has no model yet{_progress(folder)}. It writes one when it ends.")
    raise ModelError(f"model: {name} has no config.json: neither a model's folder nor a run's.")


def _progress(folder: Path) -> str:
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return f": {status['status']}, step {status['step']} of {status['num_steps']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
