"""Rows: read, checked, tokenized, divided by prompt and put in order."""

from rlhf.orchestrator.data.encoding import EpisodePrompts
from rlhf.orchestrator.data.load import check_rows, load_groups, load_prompts
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.data.split import DataSplit

__all__ = ["DataSplit", "EpisodePrompts", "Order", "check_rows", "load_groups", "load_prompts"]
