"""Flags as OpenRLHF spells them, put into this project's own, so that a launch command of its works as it stands."""

from rlhf.config.loading.openrlhf.translation import Translation, translate

__all__ = ["Translation", "translate"]
