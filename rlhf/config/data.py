"""Which rows a run reads, and what they mean."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from rlhf.config.base import Section

MAX_ROW_BYTES = 8 * 2**20


class DataSection(Section):
    """Which rows are read. Columns are recognized by their usual names; the *_key settings name others."""

    path: str | None = None
    """File or glob (.jsonl, .json, .csv, .parquet, also .gz), folder of such files, `datasets` folder, or hub name."""
    eval_path: str | None = None
    """Rows held out for evaluation; if not given, eval_fraction of the prompts."""
    eval_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the prompts that is held out. Rows with the same prompt are never split between training and
    evaluation."""
    split_seed: NonNegativeInt = 0
    """Seed that chooses the held-out prompts. It is separate from run.seed, so that sft, rm and ppo hold out the same
    ones."""
    subset: str | None = None
    """Configuration of a hub data set, or of a folder whose README.md describes several, as main of openai/gsm8k."""
    split: str = "train"
    """Split to read, where file names (train.jsonl, test-00000-of-00002.parquet, validation/) or a data set name
    splits; all reads every split."""
    eval_split: str | None = None
    """Split of eval_path; if not given, the first of validation, test and train that is there."""
    prompt_key: str | None = None
    """Column of the prompt, text or messages (prompt, input, question, messages, ...)."""
    system_key: str | None = None
    """Column of the system message that stands before the prompt (system, system_prompt)."""
    response_key: str | None = None
    """Column of the response (response, completion, output, answer, ...), or of its steps (completions)."""
    label_key: str | None = None
    """Column of the reference answer, which reward functions get (label, answer, ...); for kto, the column that says
    whether the response is good; for prm, the labels of the steps."""
    chosen_key: str | None = None
    """Column of the better response."""
    rejected_key: str | None = None
    """Column of the worse response."""
    step_separator: str = Field("\n", min_length=1)
    """Text that ends each step of a response, for process reward models."""
    ranking_key: str | None = None
    """Column with a list of responses, best first."""
    margin_key: str | None = None
    """Column with the margin of chosen over rejected."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat renders messages through the chat template; plain joins text as it is; auto decides by the column."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's default: the name of another one of its templates, or a .jinja
    file."""
    prompt_format: str = "{prompt}"
    """Text around a prompt that is text, e.g. "Question: {prompt}\\nAnswer:"."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with rows that exceed the token limits; they are counted in each case. truncate cuts responses, never
    prompts: a row whose prompt alone is too long is dropped."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that may be invalid before the run is refused. Each is dropped, named and counted."""
    max_row_bytes: PositiveInt = MAX_ROW_BYTES
    """Longest row of a file. It is checked before the row is parsed, so that memory is bounded."""
    allow_control_tokens: bool = False
    """Allow special tokens inside text."""
    max_tokens: PositiveInt = 1024
    """Longest prompt plus response, in tokens, in offline training."""
    shuffle: bool = True
    """Visit the rows in a new seeded order each epoch."""

    @field_validator("prompt_format")
    @classmethod
    def _holds_the_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError(f'must hold {{prompt}} exactly once (got "{value}").')
        return value
