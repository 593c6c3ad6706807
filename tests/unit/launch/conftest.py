"""A folder with a model and rows, for tests that damage them."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from tests.tiny_models import make_policy


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_policy(tmp_path_factory.mktemp("whole") / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    return folder


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("short")
    train_tokenizer([f"row {n} of the data set" for n in range(100)], 300, folder)
    make_llama(folder, vocab_size=300, hidden_size=32, num_layers=1, context=64)
    return folder


@pytest.fixture
def world(whole_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `model` and `rows.jsonl`, to be changed as a test likes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole_model, tmp_path / "model")
    rows = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
