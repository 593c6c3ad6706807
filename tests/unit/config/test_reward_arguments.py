"""What the parameters of a reward function get: by their names, by place where no name says otherwise, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rlhf.config.reward.arguments import (
    COLUMNS,
    LABELS,
    PLURAL,
    SINGULAR,
    Binding,
    Parameter,
    UnclearArgumentsError,
    bind_arguments,
    has_known_names,
)
from rlhf.engines.process.user_code import inspected


def parameters(signature: str) -> list[Parameter]:
    scope: dict[str, object] = {}
    exec(f"def f({signature}): ...", scope)
    _, hello = inspected(scope["f"], "f")  # type: ignore[arg-type]
    return TypeAdapter(list[Parameter]).validate_python(hello["parameters"])


def bind(signature: str, *columns: str) -> Binding:
    return bind_arguments("rewards:f", parameters(signature), columns)


@pytest.mark.parametrize(
    ("signature", "columns", "described"),
    [
        ("prompts, responses", "labels", "prompts, responses"),
        ("responses, prompts", "labels", "responses, prompts"),
        ("prompts, completions", "labels", "prompts, completions = responses"),
        ("completions, prompts", "labels", "completions = responses, prompts"),
        ("a, b", "labels", "a = prompts, b = responses"),
        ("a, b, /", "labels", "a = prompts, b = responses"),
        ("questions, outputs, labels", "labels", "questions = prompts, outputs = responses, labels"),
        ("prompts, outputs", "labels", "prompts, outputs = responses"),
        ("inputs, responses", "labels", "inputs = prompts, responses"),
        ("prompts, answers", "labels", "answers = responses, prompts"),
        ("prompts, answers", "", "prompts, answers = responses"),
        ("prompts, responses, answers", "labels", "prompts, responses, answers = labels"),
        ("prompts, responses, solution", "labels solution", "prompts, responses, solution = column solution"),
        ("prompts, responses, answer, weight=1.0", "labels", "prompts, responses, answer = labels"),
        ("prompts, responses, weight=1.0", "weight", "prompts, responses, weight = column weight"),
        ("level, responses", "level", "level = column level, responses"),
        # OpenRLHF
        ("queries, prompts, labels", "labels", "queries = prompts + responses, prompts, labels"),
        ("queries, prompts, labels", "", "queries = prompts + responses, prompts, labels"),
        ("prompts, queries, labels", "labels", "prompts, queries = prompts + responses, labels"),
        # TRL
        (
            "completions, ground_truth, **kwargs",
            "labels ground_truth",
            "completions = responses, ground_truth = column ground_truth, labels, prompts",
        ),
        ("completions, **kwargs", "level", "completions = responses, labels, prompts, level = column level"),
        ("prompts, completions, completion_ids", "", "prompts, completions = responses, completion_ids = token ids"),
        ("**kwargs", "", "labels, prompts, responses, completions = responses"),
        ("*args, **kwargs", "", "labels, prompts, responses, completions = responses"),
        (
            "prompts, completions, answer, **kwargs",
            "labels answer",
            "prompts, completions = responses, answer = column answer, labels",
        ),
        ("completions, solution, log_metric=None", "solution", "completions = responses, solution = column solution"),
        ("completions, gt=None", "labels", "completions = responses, gt = labels"),
        ("responses, expected_answer", "labels", "responses, expected_answer = labels"),
        ("*, responses, prompts", "", "responses, prompts"),
        # verl
        (
            "model_output: str, ground_truth: str, timeout_score: float = 0",
            "labels",
            "model_output = responses, ground_truth = labels",
        ),
        ("predict_str, ground_truth", "labels", "predict_str = responses, ground_truth = labels"),
        (
            "data_source, solution_str, ground_truth, extra_info=None",
            "data_source reward_model extra_info",
            "data_source = column data_source, solution_str = responses, ground_truth = column "
            "reward_model.ground_truth, extra_info = column extra_info",
        ),
        (
            "data_source, solution_str, ground_truth, extra_info",
            "data_source labels",
            "data_source = column data_source, solution_str = responses, ground_truth = labels, extra_info = {}",
        ),
        (
            "data_sources, solution_strs, ground_truths, extra_infos",
            "data_source ground_truth extra_info",
            "data_sources = column data_source, solution_strs = responses, ground_truths = column ground_truth, "
            "extra_infos = column extra_info",
        ),
    ],
)
def test_arguments_are_given_by_name(signature: str, columns: str, described: str) -> None:
    binding = bind(signature, *columns.split())
    assert sorted(binding.described.split(", ")) == sorted(described.split(", "))
    assert binding.each is any(name in signature for name in ("solution_str,", "model_output", "predict_str"))


@pytest.mark.parametrize(
    ("signature", "each"),
    [
        ("prompt, response", True),
        ("completion, answer", True),
        ("question: str, reply: str", True),
        ("prompt: str, response: str", True),
        ("prompt: list[str], response: list[str]", False),
        ("prompts: list[str], responses: list[str]", False),
        ("solution_str, ground_truth", True),
        ("solution_strs, ground_truth", False),
        ("a, b", False),
    ],
)
def test_a_function_of_one_response_is_called_for_each(signature: str, each: bool) -> None:
    assert bind(signature, "labels").each is each


@pytest.mark.parametrize(
    ("signature", "columns", "why"),
    [
        ("queries, responses", "labels", "queries may mean prompts, or prompts and responses together"),
        ("answers, prompts", "labels", "answers may mean the policy's responses or the rows' reference answers"),
        ("answers, labels", "labels", "answers may mean the policy's responses or the rows' reference answers"),
        ("prompts, answers", "answers labels", "no parameter is known to get the responses"),
        ("prompts", "labels", "no parameter is known to get the responses"),
        ("prompts, ground_truth", "labels", "no parameter is known to get the responses"),
        ("labels, prompts", "labels", "no parameter is known to get the responses"),
        ("a", "labels", "a may mean prompts or responses"),
        ("a, labels", "labels", "a stands before labels, and may mean prompts or responses"),
        ("a, prompts", "labels", "needs a, which the rows do not have"),
        ("a, b", "b", "needs a, which the rows do not have"),
        ("a, b", "a", "needs b, which the rows do not have (have a)"),
        ("*texts", "labels", "no parameter is known to get the responses"),
        ("", "labels", "no parameter is known to get the responses"),
        ("prompt, responses", "labels", "prompt means one response, responses means several"),
        ("prompt, response", "response", "response may mean the policy's response or the column response"),
        ("data_source, solution_str, ground_truth", "labels", "needs data_source, which the rows do not have"),
        ("solution_str, ground_truth", "", "needs ground_truth, which the rows do not have (have no columns)"),
        ("level, completions", "labels", "needs level, which the rows do not have"),
        ("self, prompts, responses", "labels", "needs self, which the rows do not have"),
        ("prompts, responses, x, y", "labels", "needs x, y, which the rows do not have"),
        ("outputs, inputs", "labels", "outputs does not sound like prompts"),
        ("response_texts, prompt_texts", "labels", "response_texts does not sound like prompts"),
        ("preds, goldens", "labels", "preds does not sound like prompts"),
        ("hypotheses, sources", "labels", "hypotheses does not sound like prompts"),
        ("texts, questions", "labels", "questions does not sound like responses"),
        ("prompts, scores", "labels", "scores does not sound like responses"),
        ("prompts, response_ids", "labels", "response_ids does not sound like responses"),
        ("prompt_ids, outputs", "labels", "needs prompt_ids, outputs, which the rows do not have"),
        ("args, sample, **kwargs", "labels", "needs args, sample, which the rows do not have"),
        ("samples, prompts, outputs, **kwargs", "labels", "needs samples, outputs, which the rows do not have"),
        ("preds, refs", "labels", "preds stands before refs, and may mean prompts or responses"),
        ("reply: str, question: str", "labels", "reply does not sound like prompts"),
        ("prompt, completions, prompt_ids, completion_ids, answer", "labels", "prompt means one response"),
        ("completions, trainer_state", "labels", "needs trainer_state, which the rows do not have"),
    ],
)
def test_what_is_not_clear_is_refused_with_a_signature_to_write(signature: str, columns: str, why: str) -> None:
    with pytest.raises(UnclearArgumentsError) as error:
        bind(signature, *columns.split())
    assert why in str(error.value)
    assert str(error.value).endswith("Write def f(prompts, responses, labels, **columns).")


NAMES = st.sampled_from(sorted({*PLURAL, *SINGULAR, *LABELS, *COLUMNS, "a", "b", "level", "question"}))


@given(
    names=st.lists(NAMES, unique=True, max_size=5),
    columns=st.lists(NAMES, unique=True, max_size=4),
    takes_columns=st.booleans(),
)
def test_a_known_name_never_gets_anything_else(names: list[str], columns: list[str], takes_columns: bool) -> None:
    try:
        binding = bind(", ".join([*names, *(["**columns"] if takes_columns else [])]), *columns)
    except UnclearArgumentsError:
        return
    values = dict(binding.named)
    assert set(names) <= set(values)
    assert {"responses", "queries", "token_ids"} & {value for value in values.values() if isinstance(value, str)}
    for name, value in values.items():
        expected = PLURAL.get(name) or SINGULAR.get(name)
        if expected is not None and name in names and name not in columns:
            assert value == expected
        if name in COLUMNS:
            assert value not in ("prompts", "responses", "labels")
        if name in LABELS and name not in ("answers", "solutions"):
            assert value not in ("prompts", "responses", "queries")


def test_what_only_rows_can_decide_is_left_open_without_rows() -> None:
    assert has_known_names(parameters("completions, ground_truth, weight=1.0, *args, **columns"))
    assert not has_known_names(parameters("completions, level"))
