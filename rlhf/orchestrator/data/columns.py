"""Which columns of a data set mean what, by the usual names or by the config's keys."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config.data import DataSection, RowKind
from rlhf.errors import DataError

PROMPT = (
    "prompt", "instruction", "question", "query", "input", "messages", "conversation", "conversations",
    "context_messages",
)  # fmt: skip
RESPONSE = ("response", "completion", "output", "answer", "demonstration")
LABEL = ("label", "answer", "solution", "ground_truth", "reference", "target")
RANKING = ("ranking", "ranked_responses")
STEPS = ("completions", "steps")
STEP_LABELS = ("labels", "step_labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The name of each column that is there. `response_given` is True where the config names the response."""

    prompt: str | None
    response: str | None
    label: str | None
    chosen: str | None
    rejected: str | None
    ranking: str | None
    margin: str | None
    id: str | None
    text: str | None
    response_given: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether a row holds a better and a worse response."""
        return self.chosen is not None and self.rejected is not None

    @property
    def pairs_as_labels(self) -> bool:
        """Whether binary feedback is read off pairs: the better response is desirable, the worse one is not."""
        return self.is_pair and not self.response_given

    @property
    def texts(self) -> set[str]:
        """The columns that hold prompts and responses: everything else of a row is metadata."""
        names = (self.prompt, self.chosen, self.rejected, self.ranking, self.id, self.text)
        return {name for name in names if name is not None}


def find_columns(section: DataSection, available: Sequence[str], kind: RowKind) -> Columns:
    """Say which column is which. Raises DataError naming every key that is not there and every need not met."""
    problems: list[str] = []
    have = ", ".join(available)

    def find(key: str, given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None and given not in available:
            problems.append(f'data.{key}: no column "{given}" (have {have}).')
        return given or next((name for name in usual if name in available), None)

    columns = Columns(
        prompt=find("prompt_key", section.prompt_key, PROMPT),
        response=find("response_key", section.response_key, STEPS if kind is RowKind.STEPS else RESPONSE),
        label=find("label_key", section.label_key, STEP_LABELS if kind is RowKind.STEPS else LABEL),
        chosen=find("chosen_key", section.chosen_key, ("chosen",)),
        rejected=find("rejected_key", section.rejected_key, ("rejected",)),
        ranking=find("ranking_key", section.ranking_key, RANKING),
        margin=find("margin_key", section.margin_key, ("margin",)),
        id=find("id", None, ("id",)),
        text=find("text", None, ("text",)),
        response_given=section.response_key is not None,
    )
    if not problems:
        problems = [f"data: no {need} (have {have})." for need in _missing(columns, kind)]
    if problems:
        raise DataError(problems)
    return columns


def _missing(columns: Columns, kind: RowKind) -> list[str]:
    prompt = columns.prompt is not None
    pair, read_off_pairs = columns.is_pair, columns.pairs_as_labels
    needs: dict[RowKind, list[tuple[bool, str]]] = {
        RowKind.PROMPTS: [(prompt or columns.chosen is not None, "prompt column; set data.prompt_key")],
        RowKind.DEMONSTRATIONS: [(prompt or columns.chosen is not None, "prompt column; set data.prompt_key")],
        RowKind.PREFERENCES: [
            (pair or columns.ranking is not None, "chosen and rejected, nor ranking; set data.chosen_key"),
            (prompt or pair, "prompt column; set data.prompt_key"),
        ],
        RowKind.LABELED: [
            (read_off_pairs or prompt, "prompt column; set data.prompt_key"),
            (read_off_pairs or columns.response is not None, "response column; set data.response_key"),
            (read_off_pairs or columns.label is not None, "label column; set data.label_key"),
        ],
        RowKind.STEPS: [
            (prompt, "prompt column; set data.prompt_key"),
            (columns.response is not None, "steps (a column completions); set data.response_key"),
            (columns.label is not None, "labels of the steps; set data.label_key"),
        ],
        RowKind.TEXTS: [(columns.text is not None or prompt, "text column")],
    }
    return [what for met, what in needs[kind] if not met]
