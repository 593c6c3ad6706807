"""Settings of an algorithm that lives outside this package."""

from typing import Literal

from pydantic import Field, JsonValue

from rlhf.config.algo.common import AlgorithmSection
from rlhf.config.import_name import ImportName


class CustomSection(AlgorithmSection):
    """An algorithm of the user's own: a class derived from rlhf.Algorithm."""

    type: Literal["custom"] = "custom"
    """An algorithm of your own."""
    algorithm: ImportName
    """module:Class or file.py:Class, imported on the driver and on every worker and called with this section."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of the class, under keys of its own."""
    reference: bool = False
    """Whether a reference model is started, for an algorithm that needs ref_log_probs."""

    @property
    def uses_reference(self) -> bool:
        return self.reference
