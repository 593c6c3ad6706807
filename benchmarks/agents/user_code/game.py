"""An environment: guess a number from 1 to 100."""

from rlhf import Result

NUM_NUMBERS = 100
MISS = -0.1
"""The reward of a wrong guess; the right one has 1, so that fewer guesses are better."""


class Guess:
    """Says of each guess whether the secret is higher or lower."""

    def reset(self, secret: int) -> None:
        self._secret = secret

    def step(self, text: str) -> Result:
        word = text.strip()
        if not word.isdecimal():
            return Result("number", reward=MISS)
        guess = int(word)
        if guess == self._secret:
            return Result("right", reward=1.0, terminated=True)
        return Result("higher" if guess < self._secret else "lower", reward=MISS)
