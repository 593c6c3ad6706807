"""A reward function that does what its rows say."""

from collections.abc import Iterator

import pytest

from rlhf.engines.rewards import FunctionReward


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionReward]:
    """A function that does what its first prompt says: one process for all tests that need no other."""
    folder = tmp_path_factory.mktemp("evaluator")
    lines = ["import os, time", "def score(prompts, responses, **columns):", "    scope = dict(columns)"]
    lines += ["    scope |= {'prompts': prompts, 'responses': responses}"]
    lines += ["    exec(columns['code'][0], globals() | scope, found := {})", "    return found['result']"]
    (folder / "evaluates.py").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        reward = FunctionReward("evaluates:score", timeout_s=20.0)
        yield reward
        reward.close()
