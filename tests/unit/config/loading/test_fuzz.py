"""Whatever is typed, the response is a config or lines about it, never a traceback."""

import contextlib
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.commands import METHODS, PpoConfig, SftConfig
from rlhf.config.fields import fields_of
from rlhf.config.loading.load import dump_config, load_config
from rlhf.config.loading.yaml_text import Document, YamlError
from rlhf.errors import ConfigError

NAMES = [field.name for field in fields_of(PpoConfig)]
WORDS = st.sampled_from(
    ["", "0", "-1", "1e-6", "true", "nan", "null", "[", "[]", "{}", "{a: b}", "a,b", "9" * 400, "all"]
)
VALUES = WORDS | st.text(max_size=12)
FLAGS = st.sampled_from([*NAMES, "colocate", "resume", "set", "no-resume", "x", "algo", "algo.kl", "reward.sources.0"])
ARGV = st.lists(
    st.tuples(FLAGS.map(lambda name: f"--{name}"), VALUES).map(list) | VALUES.map(lambda v: [v]), max_size=6
)
YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, "policy", "type", "kl"]), inner, max_size=4)
    ),
    max_leaves=8,
)
NUM_EXAMPLES = int(os.environ.get("RLHF_TEST_EXAMPLES", "60"))
QUICK = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(command: str, argv: list[str], environ: dict[str, str]) -> None:
    problems: tuple[str, ...] = ("none",)
    try:
        load_config(command, argv, environ)
    except ConfigError as error:
        problems = error.problems
    assert problems
    assert all(problems)


@QUICK
@given(
    st.sampled_from(list(METHODS)),
    ARGV,
    st.dictionaries(st.sampled_from(["RLHF__POLICY__LR", "RLHF__", "RLHF__X"]), VALUES),
)
def test_any_command_line(command: str, words: list[list[str]], environ: dict[str, str]) -> None:
    attempt(command, [word for part in words for word in part if word != "/"], environ)


@QUICK
@given(YAML)
def test_any_structure_in_a_file(tmp_path: Path, content: object) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    attempt("ppo", [str(file)], {})


@QUICK
@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}'\"#&*!|>%@`,? \n\t1.e$\\", max_size=40).map(str.encode))
def test_any_bytes_in_a_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    attempt("ppo", [str(file)], {})


@QUICK
@given(st.text(max_size=30))
def test_any_text_survives_being_saved(tmp_path: Path, text: str) -> None:
    config = SftConfig.model_validate({"data": {"path": text, "split": text}, "policy": {"model": "m"}})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config("sft", [str(file)], {}).data == config.data


@pytest.mark.parametrize("text", ["a: 1", "- x", "a:\n  b: [1, 2]"])
def test_a_document_cut_anywhere_is_read_or_refused(text: str) -> None:
    for length in range(len(text)):
        with contextlib.suppress(YamlError):
            Document(text[:length])
