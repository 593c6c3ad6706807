"""An environment for stories: the model writes one, hears how the next one begins, and writes that too."""

import random

from configs.stories.rewards import joy
from rlhf import Result

NUM_STORIES = 3
NAMES = ("Lily", "Tom", "Mia", "Max", "Ben", "Sue")
OPENINGS = ("{name} had a big red ball.", "In the morning, {name} saw a bird.", "{name} wanted to help the old cat.")


class Relay:
    """Three stories, one a turn. The row's prompt opens the first one; each is rewarded for its joy."""

    def reset(self, messages: list[dict[str, str]]) -> None:
        self._chance = random.Random(messages[-1]["content"])  # the same openings for all responses to a row
        self._num_told = 0

    def step(self, text: str) -> Result:
        self._num_told += 1
        (reward,) = joy([""], [text])
        opening = self._chance.choice(OPENINGS).format(name=self._chance.choice(NAMES))
        return Result(opening, reward / NUM_STORIES, terminated=self._num_told == NUM_STORIES)
