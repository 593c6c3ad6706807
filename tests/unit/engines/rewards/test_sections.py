"""What a config says of rules and sources: what follows from other settings, what does not mix, what the page shows."""

import re
import typing
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.config.commands import OnlineConfig
from rlhf.config.loading.load import load_config
from rlhf.config.reward import (
    FormatSource,
    RewardSection,
    Source,
)
from rlhf.engines.rewards import build_reward
from rlhf.errors import ConfigError

pytestmark = pytest.mark.timeout(30)


def test_limits_follow_the_longest_response() -> None:
    arguments = ["--data.path", "x", "--policy.model", "m", "--rollout.max_response_tokens", "100"]
    config = load_config("grpo", [*arguments, "--reward.rules", "length,overlong"])
    length, overlong = config.reward.sources  # type: ignore[attr-defined]
    assert (length.limit, overlong.limit, overlong.buffer) == (50, 100, 20)
    with pytest.raises(ConfigError, match="needs a limit"):
        build_reward(RewardSection(rules=("overlong",)).all_sources, {})


def test_overlong_responses_are_penalized_once() -> None:
    arguments = ["--data.path", "x", "--policy.model", "m", "--reward.rules", "number,overlong"]
    with pytest.raises(ConfigError) as error:
        load_config("grpo", [*arguments, "--algo.type", "dapo"])
    assert str(error.value) == (
        "algo.overlong_buffer: a reward source already penalizes overlong responses. Set it to 0, or remove the source "
        "overlong."
    )
    load_config("grpo", arguments)


PAGE = Path(__file__).parents[4] / "docs" / "rewards.md"
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("type: ")[1][:12])
def test_the_sources_that_the_page_shows_are_accepted(example: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(example)
    config = load_config("grpo", [str(tmp_path / "run.yaml"), "--data.path", "x", "--policy.model", "m"])
    assert isinstance(config, OnlineConfig)
    assert len(config.reward.all_sources) == example.count("type: ")


def test_the_page_shows_every_source() -> None:
    shown = {kind for example in EXAMPLES for kind in re.findall(r"type: ([\w-]+)", example)}
    assert shown == {str(kind.model_fields["type"].default) for kind in typing.get_args(Source)}


def test_rules_and_sources_do_not_mix() -> None:
    with pytest.raises(ValidationError, match="rules and sources are both given"):
        RewardSection(rules=("number",), sources=(FormatSource(),))
