"""Several environments in one run: the column `environment` of a row names its own."""

import pytest

from rlhf.environments.spec import EnvironmentNameError, named_environment
from rlhf.episode import Ending
from tests.unit.environments.playing import HERE, Make, call, says

BOTH = ("Guess", "Shelf")


def test_each_row_meets_its_own_environment(play: Make) -> None:
    game = play(says("5", "7"), environment=BOTH).row(environment="Guess", secret=7)
    guessed = game.once()
    assert guessed.episode.ending is Ending.TERMINATED
    assert guessed.episode.reward == pytest.approx(0.9)
    assert "put" not in game.text(guessed)


def test_only_the_environment_with_tools_has_its_calls_read(play: Make) -> None:
    keep = call("put", what="book")
    shelf = play(says(keep, "over"), environment=BOTH).row(environment=f"{HERE}Shelf")
    kept = shelf.once()
    assert (kept.episode.ending, kept.episode.calls, kept.episode.reward) == (Ending.ANSWER, {"put": 1}, 1.0)
    game = play(says(keep, keep), environment=BOTH, num_retries=0).row(environment="Guess", secret=7)
    failed = game.once()
    assert failed.episode.num_calls == 0, "what looks like a call is a guess here"
    assert failed.episode.failure.startswith(f"{HERE}Guess: row row 1, turn 1: step() raised ValueError")


def test_a_name_is_that_of_the_class_or_the_whole() -> None:
    names = ("games:Guess", "games:Sums", "others.games:Sums")
    assert named_environment(names, {"environment": "Guess"}) == "games:Guess"
    assert named_environment(names, {"environment": "others.games:Sums"}) == "others.games:Sums"
    have = "have Guess, games:Sums, others.games:Sums"
    with pytest.raises(EnvironmentNameError, match=f'environment is "Sums"; {have}'):
        named_environment(names, {"environment": "Sums"})
    with pytest.raises(EnvironmentNameError, match=f"environment is missing, .*; {have}"):
        named_environment(names, {})
    with pytest.raises(EnvironmentNameError, match="environment is 3;"):
        named_environment(names, {"environment": 3})
