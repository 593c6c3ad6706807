"""Prompts with a response whose steps are labeled right or wrong."""

from rlhf.config.data import DataSection
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.dialogue import parse_text
from rlhf.orchestrator.data.encoding import EncodedResponse, Encoder, as_steps, cut_steps
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.base import OVERLONG, PROMPT_NEEDED, LeftOutError, OfflineRows
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import Record, parse_prompt
from rlhf.orchestrator.data.values import shown
from rlhf.types import Json, Prompt, ScoredGroup


class Steps(OfflineRows):
    """One response a prompt, in steps that are labeled good (1) or bad (0), for process reward models (Lightman et al.
    2023).

    The rollout holds the tokens of all steps, each ended by data.step_separator; its `loss_mask` is True at the last
    token of each step, and its `step_labels` say how good these are, in order.
    """

    holds = "prompts with a response whose steps are labeled right or wrong"
    response_names = ("completions", "steps")
    label_names = ("labels", "step_labels")

    def missing(self, columns: Columns) -> list[str]:
        needs = [
            (columns.prompt, PROMPT_NEEDED),
            (columns.response, "steps (a column completions); set data.response_key"),
            (columns.label, "labels of the steps; set data.label_key"),
        ]
        return [what for name, what in needs if name is None]

    def reads(self, columns: Columns) -> set[str | None]:
        return super().reads(columns) | {columns.response, columns.label}

    def parse(self, row: Row, columns: Columns) -> Record:
        assert columns.prompt is not None, "it is a column that steps need"
        assert columns.response is not None, "it is a column that steps need"
        assert columns.label is not None, "it is a column that steps need"
        given, labels = row.values.get(columns.response), row.values.get(columns.label)
        if not isinstance(given, list) or not given:
            raise RowError(f"{columns.response} is not a list of steps.")
        if not isinstance(labels, list) or len(labels) != len(given):
            got = len(labels) if isinstance(labels, list) else "no list of"
            raise RowError(f"{columns.label}: {got} labels for {len(given)} steps.")
        steps = tuple(parse_text(step, f"{columns.response}[{index}]") for index, step in enumerate(given))
        return Record(
            row=row,
            prompt=parse_prompt(row, columns),
            names=(columns.prompt,),
            steps=steps,
            step_labels=tuple(_step_label(label, f"{columns.label}[{index}]") for index, label in enumerate(labels)),
        )

    def encode(self, encoder: Encoder, record: Record) -> tuple[Prompt, list[EncodedResponse]]:
        prompt = encoder.prompt(record)
        return prompt, [encoder.steps(record, prompt)]

    def one_group(self, section: DataSection, encoder: Encoder, record: Record) -> ScoredGroup:
        """Whole steps only: `truncate` cuts between steps."""
        prompt, (whole,) = self.encode(encoder, record)
        response = cut_steps(whole, section.max_tokens - len(prompt.token_ids))
        is_whole = len(response.token_ids) == len(whole.token_ids)
        if not len(response.token_ids) or not (is_whole or section.overlong == "truncate"):
            raise LeftOutError(OVERLONG)
        return as_steps(prompt, response, is_whole, record)


def _step_label(value: Json, name: str) -> float:
    """How good a step is: true, "+" or 1 is good; false, "-" or 0 is bad; a share of good ends is between."""
    if value in ("+", "-"):
        return float(value == "+")
    if isinstance(value, str) or not isinstance(value, bool | int | float) or not 0.0 <= value <= 1.0:
        raise RowError(f"{name} must be true, false or from 0 to 1 (got {shown(value)}).")
    return float(value)
