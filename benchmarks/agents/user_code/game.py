"""An environment: guess a number from 1 to 100."""

from rlhf import Result

NUM_NUMBERS = 100
HIGHER, LOWER = "higher", "lower"
MISS = -0.1
"""The reward of a wrong guess; the right one has 1, so that fewer guesses are better."""


class Guess:
    """Says of a wrong guess only whether the number is higher or lower. What is no number counts as 0."""

    def reset(self, secret: int) -> None:
        self._secret = secret

    def step(self, text: str) -> Result:
        guess = int(text) if text.strip().isdecimal() else 0
        if guess == self._secret:
            return Result("right", reward=1.0, terminated=True)
        return Result(HIGHER if guess < self._secret else LOWER, reward=MISS)
