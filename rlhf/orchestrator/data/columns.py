"""Which columns of a data set mean what, by the usual names or by the config's keys."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config.data import DataSection
from rlhf.errors import DataError

PROMPT = (
    "prompt", "instruction", "question", "query", "input", "messages", "conversation", "conversations",
    "context_messages",
)  # fmt: skip
RESPONSE = ("response", "completion", "output", "answer", "demonstration")
LABEL = ("label", "answer", "solution", "ground_truth", "reference", "target")
SYSTEM = ("system", "system_prompt")
RANKING = ("ranking", "ranked_responses")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The name of each column that is there. `response_given` and `system_given` are True where the config names the
    response or the system message."""

    prompt: str | None
    response: str | None
    label: str | None
    chosen: str | None
    rejected: str | None
    ranking: str | None
    margin: str | None
    id: str | None
    text: str | None
    system: str | None = None
    response_given: bool = False
    system_given: bool = False

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


def find_columns(
    section: DataSection, available: Sequence[str], responses: Sequence[str], labels: Sequence[str]
) -> Columns:
    """Say which column is which; `responses` and `labels` are the usual names of these columns. Raises DataError naming
    every column that the config names and that is not there."""
    problems: list[str] = []
    have = ", ".join(available)

    def find(key: str, given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None and given not in available:
            problems.append(f'data.{key}: no column "{given}" (have {have}).')
        return given or next((name for name in usual if name in available), None)

    columns = Columns(
        prompt=find("prompt_key", section.prompt_key, PROMPT),
        response=find("response_key", section.response_key, responses),
        label=find("label_key", section.label_key, labels),
        chosen=find("chosen_key", section.chosen_key, ("chosen",)),
        rejected=find("rejected_key", section.rejected_key, ("rejected",)),
        ranking=find("ranking_key", section.ranking_key, RANKING),
        margin=find("margin_key", section.margin_key, ("margin",)),
        id=find("id", None, ("id",)),
        text=find("text", None, ("text",)),
        system=find("system_key", section.system_key, SYSTEM),
        response_given=section.response_key is not None,
        system_given=section.system_key is not None,
    )
    if problems:
        raise DataError(problems)
    return columns
