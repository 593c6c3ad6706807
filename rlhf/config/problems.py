"""Error messages about a config."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass

from pydantic_core import ErrorDetails

from rlhf.config.fields import Field
from rlhf.errors import ConfigError

SECRET = re.compile(
    r"(^|_)((api|access|secret|auth|private)_?(key|token)|(hf|hub)_token|password|secret|credentials?)$|^token$"
)
"""Last part of an unknown key that looks like it holds a secret."""
SECRET_VARIABLES = {"wandb": "WANDB_API_KEY", "log": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN"}

PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "only letters, digits, . _ -, and a letter or digit first",
}
"""What a field's pattern asks for, in words."""
LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with values that are each valid alone. `keys` are the values involved, the main one first;
    `error` decides the exit code."""

    keys: tuple[str, ...]
    text: str
    error: type[ConfigError] = ConfigError


def shown(value: object) -> str:
    """A value as it is quoted in a message: text in quotes, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
    if isinstance(value, str) and value.lower() in {"nan", "inf", "-inf"}:
        text = value.lower()
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def secret_advice(key: str) -> str | None:
    """What to do about an unknown key that looks like it holds a secret; None for other keys."""
    section, _, last = key.rpartition(".")
    if not SECRET.search(last):
        return None
    variable = SECRET_VARIABLES.get(section.partition(".")[0], "it in the environment")
    return f"secrets may not be in config; export {variable}."


KINDS = {
    "missing": "missing",
    "extra_forbidden": "not a setting of this type",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text in UTF-8",
    "tuple_type": "must be a list",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "union_tag_not_found": "type is missing",
    "too_short": "must have {min_length} items",
    "too_long": "must have {max_length} items",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be finite",
    "union_tag_invalid": "type must be one of {expected_tags}",
}
"""pydantic's kinds of errors in our words; braces are filled from the error's context."""
NOT_A_CHOICE = {"literal_error", "enum"}
OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def choices_of(error: ErrorDetails) -> list[str]:
    """The words that a value could have been, where it is none of them."""
    return re.findall("'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def wording(error: ErrorDetails, field: Field | None) -> str:
    """One of pydantic's errors as a sentence. `field` is the field where it happened, if it is a single field."""
    context, kind, value = error.get("ctx", {}), error["type"], error["input"]
    bounds = field.bounds if field is not None else ""
    got = f" (got {shown(context.get('tag', value))})"
    if kind == "value_error":
        return f"{str(context['error']).rstrip('.')}."
    if kind == "string_pattern_mismatch":
        return f"{PATTERNS.get(context['pattern'], 'must match ' + context['pattern'])}{got}."
    if kind in NOT_A_CHOICE and field is not None:
        return f"must be one of {', '.join(field.words)}{got}."
    need = KINDS.get(kind, error["msg"]).format_map(defaultdict(str, context)).replace("'", "")
    if bounds and kind in OUT_OF_BOUNDS:
        need = f"must be {bounds}"
    elif bounds and kind == "finite_number":
        need = f"must be finite and {bounds}"
    return f"{need}." if kind in {"missing", "extra_forbidden", "union_tag_not_found"} else f"{need}{got}."
