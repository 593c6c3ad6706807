"""What every reward source has."""

from pydantic import FiniteFloat

from rlhf.config.base import Section


class SourceSection(Section):
    """One named source of rewards."""

    type: str
    """Kind of the source."""
    name: str = ""
    """Name in the logs; by default the type."""
    weight: FiniteFloat = 1.0
    """Factor in the total reward."""

    @property
    def label(self) -> str:
        """The name of the source in logs and metrics."""
        return self.name or self.type
