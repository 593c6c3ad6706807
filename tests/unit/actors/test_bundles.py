"""Bundles of a lost node are waited for, up to a deadline."""

import pytest

from rlhf.actors.cluster import ReservedBundles, bundle_check
from rlhf.errors import StallError


def test_lost_bundles_are_waited_for_until_the_deadline() -> None:
    times = iter((0.0, 9.0, 20.0, 29.0, 30.0))
    states = iter("xx.xxx")

    class Bundles(ReservedBundles):
        is_ready = property(lambda _: next(states) == ".")

        def missing(self, waited_s: float) -> StallError:
            return StallError(f"{self.name} waited {waited_s:g} s")

    bundles = Bundles(name="toys", placement_group=None, bundles=[])
    check = bundle_check([bundles], 10.0, lambda: next(times))
    for _ in "xx.xx":
        check()
    with pytest.raises(StallError, match="toys waited 10 s"):
        check()
