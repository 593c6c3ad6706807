"""Devices that a node took along are waited for, with an end."""

import pytest

from rlhf.actors.cluster import Reservation, require_held
from rlhf.errors import StallError


def test_devices_that_are_lost_are_waited_for_with_patience() -> None:
    times = iter((0.0, 9.0, 20.0, 29.0, 30.0))
    states = iter("xx.xxx")

    class Toys(Reservation):
        is_held = property(lambda _: next(states) == ".")

        def missing(self, waited_s: float) -> StallError:
            return StallError(f"{self.name} waited {waited_s:g} s")

    toys = Toys(name="toys", group=None, bundles=[])
    ask = require_held([toys], 10.0, lambda: next(times))
    for _ in "xx.xx":
        ask()
    with pytest.raises(StallError, match="toys waited 10 s"):
        ask()
