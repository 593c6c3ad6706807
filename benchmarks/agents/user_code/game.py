"""An environment: guess a number from 1 to 100."""

from rlhf import Result

NUM_NUMBERS = 100
MISS = -0.1
"""The reward of a wrong guess; the right one has 1, so that fewer guesses are better."""


class Guess:
    """Answers a wrong guess with the numbers that are still possible, as `51-100`."""

    def reset(self, secret: int) -> None:
        self._secret = secret
        self._low, self._high = 1, NUM_NUMBERS

    def step(self, text: str) -> Result:
        guess = int(text) if text.strip().isdecimal() else 0
        if guess == self._secret:
            return Result("right", reward=1.0, terminated=True)
        self._low, self._high = narrowed(self._low, self._high, guess, self._secret)
        return Result(possible(self._low, self._high), reward=MISS)


def narrowed(low: int, high: int, guess: int, secret: int) -> tuple[int, int]:
    """The least and the greatest number that are possible after a wrong guess."""
    return (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))


def possible(low: int, high: int) -> str:
    """How the policy reads them."""
    return f"{low}-{high}"
