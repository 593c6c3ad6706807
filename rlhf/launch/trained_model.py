"""Which model a name stands for: a folder, a hub name, or the folder of a run."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from rlhf.config.data import DataSection
from rlhf.config.loading.yaml_text import Document
from rlhf.config.rollout import EpisodeSection
from rlhf.engines.models.hub import require_found
from rlhf.errors import ModelError
from rlhf.orchestrator.run.files import write_json

STYLE_KEYS = ("template", "chat_template", "prompt_format")
PROMPTS = "prompts.json"
"""File of a run's folder that says which template its rows came to, where data.template left that to them."""


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


def remember_prompts(folder: Path, template: str) -> None:
    """Write to a run's folder how its rows became prompts: `plain`, `chat`, or `auto` for some of each."""
    write_json(folder / PROMPTS, {"template": template})


def prompt_style(model: str) -> DataSection:
    """How the run that trained a model, a folder from `find_model`, made prompts of texts: data.template,
    data.chat_template and data.prompt_format of its config, and which template its rows came to where that is auto.
    Their defaults for any other model, or where the run's config cannot be read."""
    folder = Path(model).expanduser().parent
    try:
        known = _settings_of_run(folder, "data")
        style = DataSection.model_validate({key: known[key] for key in STYLE_KEYS if key in known})
    except (OSError, ValueError, ValidationError):
        return DataSection()
    if style.template != "auto":
        return style
    return style.model_copy(update={"template": _template_of_rows(folder)})


def episode_style(model: str) -> EpisodeSection:
    """Tools, environment and their limits of the run that trained a model, a folder from `find_model`. None for any
    other model, or where the run's config cannot be read."""
    try:
        known = _settings_of_run(Path(model).expanduser().parent, "rollout")
        return EpisodeSection.model_validate({key: known[key] for key in EpisodeSection.model_fields if key in known})
    except (OSError, ValueError, ValidationError):
        return EpisodeSection()


def _settings_of_run(folder: Path, section: str) -> Mapping[str, object]:
    """A section of the config in a run's folder; empty for any other folder. Raises OSError or ValueError where it
    cannot be read."""
    if not (folder / "status.json").is_file():
        return {}
    config = Document((folder / "config.yaml").read_text(encoding="utf-8")).value
    given = config.get(section) if isinstance(config, Mapping) else None
    return given if isinstance(given, Mapping) else {}


def _template_of_rows(folder: Path) -> str:
    """What `remember_prompts` wrote; auto where it did not, or where that cannot be read."""
    try:
        content = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
        template = content["template"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"
    return template if template in ("plain", "chat") else "auto"


def _progress(folder: Path) -> str:
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return f": {status['status']}, step {status['step']} of {status['num_steps']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
