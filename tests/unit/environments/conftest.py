"""What tests of episodes share."""

from collections.abc import Iterator

import pytest

from rlhf.engines.models.tokenizer import HfTokenizer
from tests.unit.environments.playing import TOKENIZER, Make, Play
from tests.unit.environments.support import Script


@pytest.fixture
def play() -> Iterator[Make]:
    opened: list[Play] = []

    def make(
        script: Script,
        *tools: str,
        environment: str | tuple[str, ...] = (),
        tokenizer: HfTokenizer = TOKENIZER,
        **settings: object,
    ) -> Play:
        opened.append(Play(script, *tools, environment=environment, tokenizer=tokenizer, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.episodes.close()
