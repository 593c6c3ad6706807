"""What each parameter of a user's reward function gets, decided by the parameter's name.

Names of the rows' columns and of the arguments that reward functions have here, in TRL, in verl and in OpenRLHF are
known. A parameter with another name gets an argument by its place only if it is one of the first two and no name says
otherwise. Whatever remains unclear is refused: a wrong argument would give wrong rewards without an error.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

SIGNATURE = "(prompts, responses, labels, **columns)"

Argument: TypeAlias = Literal["prompts", "responses", "queries", "labels", "token_ids", "empty"]
"""What is known of every response: its prompt, its text, both together, the row's label, the response's tokens. `empty`
stands for an optional column that the rows lack."""

PLURAL: Mapping[str, Argument] = {
    "prompts": "prompts",
    "responses": "responses",
    "completions": "responses",
    "solution_strs": "responses",
    "queries": "queries",
    "completion_ids": "token_ids",
    "completions_ids": "token_ids",
}
"""Parameters of functions that get all responses at once."""
SINGULAR: Mapping[str, Argument] = {
    "prompt": "prompts",
    "response": "responses",
    "completion": "responses",
    "solution_str": "responses",
    "model_output": "responses",
    "predict_str": "responses",
    "prediction": "responses",
}
"""Parameters of functions that get one response at a time."""
LABELS = {
    "labels", "label", "ground_truths", "ground_truth", "answers", "answer", "solutions", "solution",
    "references", "reference", "targets", "target", "reference_answer", "reference_answers", "gold", "golds", "gt",
    "gold_answer", "gold_answers", "golden_answer", "golden_answers", "correct_answer", "correct_answers",
    "expected_answer", "expected_answers", "expected", "refs", "gts",
}  # fmt: skip
"""Names of the reference answer. The rows' column of that name comes first."""
EITHER = ("answers", "solutions")
"""Names that mean responses in some functions and reference answers in others."""
COLUMNS_OF_LISTS = {"data_sources": "data_source", "ground_truths": "ground_truth", "extra_infos": "extra_info"}
"""verl's parameters for all responses at once, and the columns that they stand for."""
COLUMNS = {"data_source", "data_sources", "ability", "info", "state", "task", "trainer_state", "tokenizer", "metadata"}
"""Names that are columns in other systems, and therefore never prompts or responses by place."""
NEVER_BY_PLACE = (LABELS | COLUMNS) - set(EITHER)
PROMPT_WORDS = {"prompt", "question", "input", "instruction", "problem", "query", "context", "source"}
RESPONSE_WORDS = {
    "response", "completion", "output", "generation", "generated", "prediction", "predicted", "pred", "reply",
    "hypothesis", "hyp", "candidate", "continuation",
}  # fmt: skip
LABEL_WORDS = {"label", "gold", "golden", "truth", "reference", "ref", "target", "expected", "correct"}
OTHER_WORDS = {
    "id", "token", "mask", "score", "reward", "logprob", "length", "weight", "meta", "metadata", "info", "state", "arg",
    "kwarg", "config", "cfg", "sample", "batch", "data", "row", "item", "example", "model", "tokenizer", "index", "idx",
    "step",
}  # fmt: skip
"""Words of a parameter's name that say what it is not: `outputs` is no prompt, `prompt_ids` is no text."""
OPTIONAL_COLUMNS = ("extra_info", "extra_infos")
SEVERAL = ("list", "List", "Sequence", "Iterable", "tuple", "Tuple", "collections.abc.", "typing.")


class UnclearArgumentsError(ValueError):
    """It is not clear what a reward function's parameters mean, or the rows lack what they need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of a reward function. `kind` is `place` if it can only be given by place, `name` if only by name,
    `both`, `rest` (*args) or `columns` (**kwargs). `annotation` is the text of its annotation."""

    name: str
    kind: Literal["place", "name", "both", "rest", "columns"] = "both"
    required: bool = True
    annotation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the rows; `inner` is a key of its values, which are objects."""

    name: str
    inner: str | None = None


Value: TypeAlias = Argument | Column


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a function is called with: `placed` by place, in order, then `named` by name. With `each` it is called once
    for each response, with single values instead of lists."""

    placed: tuple[tuple[str, Value], ...]
    named: Mapping[str, Value]
    each: bool

    @property
    def described(self) -> str:
        """`prompts, completions = responses, answer = column answer`."""
        pairs = [*self.placed, *self.named.items()]
        shown = [(name, _shown(value)) for name, value in pairs]
        return ", ".join(name if name == value else f"{name} = {value}" for name, value in shown)


def bind_arguments(function: str, parameters: Sequence[Parameter], columns: Collection[str]) -> Binding:
    """Decide what the function called `function` gets from rows with these `columns`, `labels` among them if the rows
    have reference answers.

    Raises UnclearArgumentsError, whose text says what would be passed where and which signature to write.
    """
    return _Binder(function, parameters, columns).bind()


def has_known_names(parameters: Sequence[Parameter]) -> bool:
    """Whether every parameter that must be given has a meaning whatever columns the rows have."""
    known = {*PLURAL, *SINGULAR, *LABELS, *OPTIONAL_COLUMNS}
    return all(p.name in known or not p.required for p in parameters if p.kind not in ("rest", "columns"))


class _Binder:
    """The steps of `bind_arguments`."""

    def __init__(self, function: str, parameters: Sequence[Parameter], columns: Collection[str]) -> None:
        self._function = function
        self._parameters = parameters
        self._columns = columns
        self._given = [parameter for parameter in parameters if parameter.kind not in ("rest", "columns")]
        self._takes_columns = any(parameter.kind == "columns" for parameter in parameters)
        self._each = self._called_for_each()

    def bind(self) -> Binding:
        values = {p.name: value for p in self._given if (value := self._by_name(p)) is not None}
        self._settle_either(values)
        if "queries" in values and "responses" in values.values():
            raise self._unclear("queries may mean prompts, or prompts and responses together")
        self._by_place(values)
        unbound = [p.name for p in self._given if p.required and p.name not in values]
        if unbound:
            have = ", ".join(sorted(self._columns)) or "no columns"
            raise UnclearArgumentsError(
                f"{self._function} needs {', '.join(unbound)}, which the rows do not have (have {have}). "
                f"{self._advice()}"
            )
        rest = self._rest(values) if self._takes_columns else {}
        if not _shows_responses([*values.values(), *rest.values()]):
            raise self._unclear("no parameter is known to get the responses")
        placed, named = self._ordered(values)
        return Binding(placed=placed, named=named | rest, each=self._each)

    def _called_for_each(self) -> bool:
        """Whether the function gets one response at a time, by the names or annotations of its parameters."""
        single = [p.name for p in self._given if p.name in SINGULAR and not p.annotation.startswith(SEVERAL)]
        several = [p.name for p in self._given if p.name in PLURAL]
        also_columns = [name for name in single if name in self._columns]
        if single and several and not also_columns:
            raise self._unclear(f"{single[0]} means one response, {several[0]} means several")
        if also_columns and not several:
            name = also_columns[0]
            raise self._unclear(f"{name} may mean the policy's {name} or the column {name}")
        single = [] if several else single
        texts = [p for p in self._given[:2] if p.name not in SINGULAR and p.name not in PLURAL]
        return bool(single) or (not several and len(texts) == 2 and all(p.annotation == "str" for p in texts))

    def _by_name(self, parameter: Parameter) -> Value | None:
        """What a parameter's name says; None if it says nothing."""
        name = parameter.name
        known = PLURAL.get(name) or (None if name in self._columns else SINGULAR.get(name))
        if known is not None:
            return known
        if name == "labels":
            return "labels"
        column = name if name in self._columns else COLUMNS_OF_LISTS.get(name, name)
        if column in self._columns:
            return Column(name=column)
        if column == "ground_truth" and "reward_model" in self._columns:
            return Column(name="reward_model", inner="ground_truth")
        if name in LABELS and "labels" in self._columns:
            return "labels"
        return "empty" if name in OPTIONAL_COLUMNS and parameter.required else None

    def _settle_either(self, values: dict[str, Value]) -> None:
        """`answers` and `solutions` are the responses if nothing else can be and they stand in their place."""
        if _shows_responses(values.values()):
            return
        for place, parameter in enumerate(self._given):
            if parameter.name in EITHER and values.get(parameter.name) == "labels":
                first = self._given[0].name
                if place != 1 or values.get(first, "prompts") != "prompts":
                    raise self._unclear(
                        f"{parameter.name} may mean the policy's responses or the rows' reference answers"
                    )
                values[parameter.name] = "responses"
                return

    def _by_place(self, values: dict[str, Value]) -> None:
        """The first two parameters are prompts and responses where their names say nothing."""
        first, second = ([p.name for p in self._given if p.kind != "name"] + ["", ""])[:2]
        knows_first, knows_second = first in values, second in values
        if not first or (knows_first and knows_second):
            return
        if not knows_first and "prompts" not in values.values():
            if not second:
                raise self._unclear(f"{first} may mean prompts or responses")
            if knows_second and values[second] in ("prompts", "labels"):
                raise self._unclear(f"{first} stands before {second}, and may mean prompts or responses")
            if _says(first, RESPONSE_WORDS | LABEL_WORDS):
                raise self._unclear(f"{first} does not sound like prompts")
            if (
                first not in NEVER_BY_PLACE
                and not _says(first, OTHER_WORDS)
                and (not knows_second or second in ("responses", "response", *EITHER))
            ):
                values[first] = "prompts"
        unknown = second and not knows_second and second not in NEVER_BY_PLACE
        if unknown and values.get(first) == "prompts" and not _shows_responses(values.values()):
            if _says(second, PROMPT_WORDS | LABEL_WORDS | OTHER_WORDS):
                raise self._unclear(f"{second} does not sound like responses")
            values[second] = "responses"

    def _rest(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What **kwargs gets: the label and every column that no parameter has, and whatever of prompts and responses
        no parameter has."""
        taken = {p.name for p in self._given}
        rest: dict[str, Value] = {"label" if self._each else "labels": "labels"}
        if "prompts" not in values.values():
            rest["prompt" if self._each else "prompts"] = "prompts"
        if not _shows_responses(values.values()):
            rest |= {"responses": "responses", "completions": "responses"}
        rest |= {name: Column(name=name) for name in self._columns if name not in {*rest, *PLURAL}}
        return {name: value for name, value in rest.items() if name not in taken}

    def _ordered(self, values: Mapping[str, Value]) -> tuple[tuple[tuple[str, Value], ...], dict[str, Value]]:
        """Parameters that can only be given by place, and the others."""
        placed: list[tuple[str, Value]] = []
        for parameter in self._given:
            if parameter.kind == "place":
                if parameter.name not in values:
                    break
                placed.append((parameter.name, values[parameter.name]))
        names = {name for name, _ in placed}
        return tuple(placed), {name: value for name, value in values.items() if name not in names}

    def _unclear(self, why: str) -> UnclearArgumentsError:
        shown = ", ".join({"rest": "*", "columns": "**"}.get(p.kind, "") + p.name for p in self._parameters)
        places = [
            f"{p.name} would get the {what}" for p, what in zip(self._given, ("prompts", "responses"), strict=False)
        ]
        by_place = f" By place, {' and '.join(places)}." if places else ""
        return UnclearArgumentsError(f"{self._function}({shown}): {why}.{by_place} {self._advice()}")

    def _advice(self) -> str:
        return f"Write def {self._function.rpartition(':')[2].rpartition('.')[2]}{SIGNATURE}."


def _shows_responses(values: Collection[Value]) -> bool:
    """Whether a function that gets these values can see the responses."""
    return any(value in ("responses", "queries", "token_ids") for value in values)


def _says(name: str, meanings: set[str]) -> bool:
    """Whether one of these words, in singular or plural, is in a parameter's name."""
    words = name.lower().split("_")
    singular = {word.removesuffix("s") for word in words} | {f"{word[:-3]}y" for word in words if word.endswith("ies")}
    return not meanings.isdisjoint({*words, *singular, *(word.replace("hypotheses", "hypothesis") for word in words)})


def _shown(value: Value) -> str:
    if isinstance(value, Column):
        return f"column {value.name}" + (f".{value.inner}" if value.inner else "")
    return {"queries": "prompts + responses", "token_ids": "token ids", "empty": "{}"}.get(value, value)
