"""One digest of everything that decides a model's outputs."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from rlhf.config.model_files import trusted_commit
from rlhf.engines.models.loading import WEIGHTS, resolve_folder
from rlhf.types import Json

DECIDING = ("config.json", WEIGHTS, "*.py")
LIBRARIES = ("torch", "transformers")


def model_fingerprint(model: str, settings: Mapping[str, Json], *, where: str, trust_remote_code: str | None) -> str:
    """sha256 of a model's weights, config and code, of `settings`, and of the libraries' versions.

    `model` is a folder or hub name; `where` begins each line of an error. Raises ModelError.
    """
    folder = resolve_folder(model, where=where, revision=trusted_commit(trust_remote_code, model))
    files = {path.name: _digest(path) for pattern in DECIDING for path in folder.glob(pattern) if path.is_file()}
    libraries = {name: version(name) for name in LIBRARIES}
    return hashlib.sha256(json.dumps([files, dict(settings), libraries], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
