"""The kinds of rows that methods read, one file each."""

from collections.abc import Mapping

from rlhf.config.commands import RowKind
from rlhf.orchestrator.data.kinds.base import OfflineRows, Rows
from rlhf.orchestrator.data.kinds.demonstrations import Demonstrations
from rlhf.orchestrator.data.kinds.labeled import Labeled
from rlhf.orchestrator.data.kinds.preferences import Preferences
from rlhf.orchestrator.data.kinds.prompts import Prompts
from rlhf.orchestrator.data.kinds.steps import Steps
from rlhf.orchestrator.data.kinds.texts import Texts

OFFLINE_ROWS: Mapping[RowKind, OfflineRows] = {
    RowKind.DEMONSTRATIONS: Demonstrations(),
    RowKind.PREFERENCES: Preferences(),
    RowKind.LABELED: Labeled(),
    RowKind.STEPS: Steps(),
    RowKind.TEXTS: Texts(),
}
"""Rows with responses to train on."""
ROWS: Mapping[RowKind, Rows] = {RowKind.PROMPTS: Prompts(), **OFFLINE_ROWS}
"""All rows."""
