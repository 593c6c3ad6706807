"""Writing the trained model in Hugging Face format, and telling the user how to load it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf.engines.base import TrainEngine
from rlhf.errors import CheckpointError, RlhfError
from rlhf.orchestrator.run.files import sync_path, sync_tree
from rlhf.types import Head

LOADING_CLASSES = {
    Head.SCORES: "AutoModelForSequenceClassification",
    Head.TOKEN_SCORES: "AutoModelForTokenClassification",
}
"""The transformers class that loads an exported model with a scalar head."""


def export_model(engine: TrainEngine, directory: Path) -> None:
    """Write the model into a temporary folder, then rename it to `directory`. No reader ever sees half a model, also
    after a power cut, and one that an earlier launch exported stays until the new one is whole.

    Raises:
        CheckpointError: the disk refuses. Checkpoints are not touched.
    """
    temporary, replaced = (directory.with_name(f"{directory.name}.{end}") for end in ("tmp", "old"))
    try:
        if replaced.exists() and not directory.exists():  # the last export was killed between its two renames
            replaced.rename(directory)
        for folder in (temporary, replaced):
            if folder.exists():
                shutil.rmtree(folder)
        temporary.mkdir()
        engine.export(temporary)
        sync_tree(temporary)
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
        sync_path(directory.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except OSError as error:
        if isinstance(error, RlhfError):
            raise
        reason = error.strerror or error
        text = f"the model cannot be written: {reason}. Every step is saved; make room, then --resume"
        raise CheckpointError(text) from error


def show_model(directory: Path, head: Head, say: Callable[[str], None]) -> None:
    """Say where the model is and how to load it."""
    loading_class = LOADING_CLASSES.get(head) or _language_model_class(directory / "config.json")
    say(f"model: {directory}")
    say(f'load it: transformers.{loading_class}.from_pretrained("{directory}")')


def _language_model_class(config: Path) -> str:
    """The transformers class that loads a language model; one that reads images too has another."""
    architectures = json.loads(config.read_text())["architectures"] if config.is_file() else []
    reads_images = any(name.endswith("ForConditionalGeneration") for name in architectures)
    return "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"
