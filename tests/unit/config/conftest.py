"""Files that configs of these tests point to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError

Problems = Callable[..., list[str]]


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problems:
    """The problems of a command line, with `text`, where given, as the config file `config.yaml`."""
    monkeypatch.chdir(tmp_path)

    def found(
        *argv: str, text: str | bytes | None = None, command: str = "ppo", environ: dict[str, str] | None = None
    ) -> list[str]:
        arguments = list(argv)
        if text is not None:
            Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
            arguments.insert(0, "config.yaml")
        try:
            load_config(command, arguments, environ or {})
        except ConfigError as error:
            return list(error.problems)
        return []

    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten rows that serve every command."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{n}", "response": "a", "chosen": "good", "rejected": "bad"} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
