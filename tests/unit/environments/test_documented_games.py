"""The game that docs/agents.md writes for three systems: each version plays, and has as many lines as the page says."""

import asyncio
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.environments.adapters.openrlhf import environment
from rlhf.environments.environment import inspect_class

PAGE = Path(__file__).parents[3].joinpath("docs", "agents.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("### The same game in three systems\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
SIZES = [int(size) for size in re.findall(r", (\d+) lines", SECTION)]


def defined(code: str) -> Mapping[str, Any]:
    scope: dict[str, Any] = {}
    exec(code, scope)  # what the page shows
    return scope


def test_lines_are_counted_right_and_ours_has_the_fewest() -> None:
    assert [sum(bool(line.strip()) for line in block.splitlines()) for block in BLOCKS] == SIZES
    assert len(SIZES) == 3
    assert SIZES[0] == min(SIZES)


def test_ours_plays() -> None:
    game = inspect_class(defined(BLOCKS[0])["Guess"]).build()
    game.reset(secret=42)  # type: ignore[attr-defined]
    results = [game.step(text) for text in ("hm", "50", "20", " 42 ")]  # type: ignore[attr-defined]
    assert [result.observation for result in results] == ["Say a number.", "Lower.", "Higher.", "Right!"]
    assert [result.reward for result in results] == [-0.05, -0.05, -0.05, 1.0]
    assert [result.terminated for result in results] == [False, False, False, True]


def test_the_version_of_openrlhf_plays(tmp_path: Path) -> None:
    file = tmp_path / "agent_func.py"
    file.write_text(BLOCKS[1])
    game = inspect_class(environment(str(file))).build()

    async def play() -> list[Any]:
        await game.reset(prompt_text="Find it.", label="42")  # type: ignore[attr-defined]
        return [await game.step(f"{text}<|im_end|>") for text in ("hm", "50", "42")]  # type: ignore[attr-defined]

    results = asyncio.run(play())
    assert [result.reward for result in results] == [pytest.approx(-0.05), pytest.approx(-0.05), 1.0]
    assert "user\nLower.<|im_end|>" in results[1].observation
    assert [result.terminated for result in results] == [False, False, True]


def test_the_version_of_trl_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the trainer, which would start to train."""
    started: list[Mapping[str, Any]] = []
    trl, datasets = types.ModuleType("trl"), types.ModuleType("datasets")
    rows = types.SimpleNamespace(map=lambda change: change({"prompt": "p"}))

    def trainer(**given: Any) -> types.SimpleNamespace:
        started.append(given)
        return types.SimpleNamespace(train=int)

    trl.__dict__.update(GRPOConfig=dict, GRPOTrainer=trainer)
    datasets.__dict__.update(load_dataset=lambda *_, **__: rows)
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    scope = defined(BLOCKS[2])
    assert started[0]["environment_factory"] is scope["Guess"]
    game = scope["Guess"]()
    game.reset(secret=42, prompt="p")
    assert [game.guess(number) for number in (50, 20, 42, 42)] == ["Lower.", "Higher.", "Right!", "The game is over."]
    assert game.get_reward() == pytest.approx(0.9)
