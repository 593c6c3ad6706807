"""Answers compared as mathematics: what is equal, and that nothing a model writes is run, hangs or kills a run."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.config.reward import MathSource
from rlhf.engines.rewards import MathReward, math_match, row_problems
from rlhf.engines.rewards.child_pool import ChildPool, call_with
from rlhf.engines.rewards.function_process import FunctionProcess
from rlhf.engines.rewards.math_match import final_formula, is_readable
from rlhf.errors import DataError, RewardError
from rlhf.types import Prompt
from tests.unit.engines.rewards.reward_support import rollouts

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    source = MathReward(MathSource(num_processes=1, timeout_s=2.0, memory_gib=1.0))
    yield source
    source.close()


def scores(source: MathReward, answers: Sequence[str], label: str | None) -> list[float]:
    row = Prompt(id="q7", token_ids=np.array([1]), text="question", label=label)
    return [one.total for one in source.score([row] * len(answers), answers, rollouts(len(answers)))]


EQUAL: dict[str, list[str]] = {
    "72": [
        "72",
        "#### 72",
        r"\boxed{72}",
        r"\boxed{72.00}",
        r"so $x = 72$",
        r"\boxed{\frac{144}{2}}",
        "72 clips",
        "seventy-two",
    ],
    "1,000": [r"\boxed{1000}", r"\boxed{1{,}000}", r"\boxed{10^3}"],
    r"\frac{1}{2}": [r"\boxed{0.5}", r"\boxed{\dfrac12}", "$1/2$", r"\boxed{2^{-1}}"],
    r"$\frac{\sqrt{2}}{2}$": [r"\boxed{\frac{1}{\sqrt{2}}}", r"it is \(\sqrt{2}/2\)."],
    "(x+1)^2": [r"\boxed{x^2+2x+1}"],
    r"\{1,2\}": [r"\boxed{\{2,1\}}"],
    "[0,1)": [r"\boxed{[0,1)}"],
    "x=5": [r"\boxed{5}", "$x = 5$"],
    r"\text{yes}": [r"\boxed{\text{yes}}"],
}
DIFFERENT: dict[str, list[str]] = {
    "72": [
        "73",
        r"\boxed{72} or \boxed{73}",
        "",
        "NaN",
        r"\boxed{}",
        "seventy-three",
        "\u0667\u0662",
        r"\boxed{\infty}",
    ],
    "[0,1)": [r"\boxed{[0,1]}", r"\boxed{0,1}"],
    r"\{1,2\}": [r"\boxed{\{1,2,3\}}"],
    "x+1": [r"\boxed{y+1}"],
}


def test_equal_is_what_is_mathematically_equal(reward: MathReward) -> None:
    for label, answers in EQUAL.items():
        assert dict(zip(answers, scores(reward, answers, label), strict=True)) == dict.fromkeys(answers, 1.0)
    for label, answers in DIFFERENT.items():
        assert dict(zip(answers, scores(reward, answers, label), strict=True)) == dict.fromkeys(answers, 0.0)


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (r"first $a$ and then $b+1$.", "b+1"),
        (r"it costs $5 and $6", "$6"),
        (r"\[ x \] and \( y \)", " y "),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("That makes 3 apples", "3"),
        ("no number at all", None),
    ],
)
def test_without_a_mark_the_last_formula_counts(text: str, formula: str | None) -> None:
    assert final_formula(text, "auto") == formula


CODE = ["__import__('os').system('touch {owned}')", "exec(\"open('{owned}','w')\")", "open('{owned}','w')"]
CODE += [r"\text{{__import__('os').system('touch {owned}')}}", r"\operatorname{{exec}}(\text{{open('{owned}','w')}})"]
CODE += [r"\sum_{{n=1}}^{{\infty}} \frac{{\text{{__import__('os').system('touch {owned}')}}}}{{n^2}}"]


def test_text_that_a_model_wrote_is_never_run(reward: MathReward, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    texts = [code.format(owned=owned) for code in CODE]
    answers = [form.replace("@", text) for text in texts for form in ("@", r"\boxed{@}", "$@$", r"\boxed{@ + 1.5}")]
    number = 271828  # no folder's name holds it
    assert scores(reward, answers, str(number)) == [0.0] * len(answers)
    # A label may hold anything as well.
    for text in texts:
        assert scores(reward, [rf"\boxed{{{number}}}", rf"\boxed{{{number}.5}}"], text) == [0.0, 0.0]
    assert not owned.exists()


def test_the_process_refuses_to_compile_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no answer could reach any more either: the libraries' own evaluators."""
    owned = tmp_path / "owned"
    (tmp_path / "attacks.py").write_text(
        "import rlhf.engines.rewards.math_child, sympy, os, socket, subprocess\n"
        "from sympy.parsing.sympy_parser import eval_expr, parse_expr as read\n"
        "from math_verify.parser import parse_expr\n"
        f"code = \"__import__('pathlib').Path({str(owned)!r}).touch()\"\n"
        "x = sympy.Symbol('x')\n"
        "def attempts():\n"
        "    yield lambda: sympy.sympify(code)\n"
        "    yield lambda: sympy.Number(code)\n"
        "    yield lambda: read(code)\n"
        "    yield lambda: parse_expr(code)\n"
        "    yield lambda: eval_expr(code, {}, {})\n"
        "    yield lambda: sympy.lambdify(x, x + sympy.Symbol(code))(1)\n"
        f"    yield lambda: os.system('touch {owned}')\n"
        f"    yield lambda: subprocess.run(['touch', {str(owned)!r}])\n"
        "    yield lambda: socket.create_connection(('127.0.0.1', 9))\n"
        "def refused(prompts, responses):\n"
        "    count = 0\n"
        "    for attempt in attempts():\n"
        "        try:\n"
        "            attempt()\n"
        "        except (PermissionError, sympy.SympifyError, SyntaxError):\n"
        "            count += 1\n"
        "    return [count]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    process = FunctionProcess("attacks:refused")
    try:
        assert process.ask(call_with("", ""), 20.0) == {"scores": [9.0], "parts": {}, "logged": {}}
    finally:
        process.close()
    assert not owned.exists()


def test_an_answer_that_takes_forever_is_wrong_and_affects_no_other(
    reward: MathReward, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    answers = [r"\boxed{9^{9^{9^9}}}", r"\boxed{72.0}", r"\boxed{9**9**9}", r"\boxed{72}"]
    assert scores(reward, answers, "72") == [0.0, 1.0, 0.0, 1.0]
    assert "1 answers count as wrong: verifying one took over 2 s" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
        r"\boxed{" + "{" * 50 + "1" + "}" * 50 + "}",
        r"\boxed{" + "[" * 2000,
        "(" * 5000,
        r"\frac{" * 3000,
        "7" * 100_000,
        r"\boxed{" + "7" * 400 + "}",
        "the answer is " * 8000,
        "$" * 100_000,
        r"\(" * 20_000,
        "\x00" * 100,
        "\ud800",
        r"\boxed{1} " * 5000,
        r"\boxed{1e999999999}",
    ],
    ids=lambda answer: answer[:12],
)
def test_no_text_breaks_the_verifier_or_earns_anything(reward: MathReward, answer: str) -> None:
    start = time.monotonic()
    assert scores(reward, [answer], "72") == [0.0]
    assert time.monotonic() - start < 10.0


def test_deep_and_long_answers_are_not_even_parsed() -> None:
    assert is_readable("(" * 20 + "1" + ")" * 20)
    assert not is_readable("(" * 21 + "1" + ")" * 21)
    assert not is_readable("1" * 501)
    assert not is_readable("")


def test_an_item_whose_child_dies_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mortal.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "def judge(prompts, responses):\n"
        "    if prompts == ['always'] or (prompts == ['once'] and not Path(responses[0]).exists()):\n"
        "        Path(responses[0]).touch()\n        os._exit(9)\n"
        "    return [0.5]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool("mortal:judge", num_processes=2, timeout_s=20.0, memory_gib=None)
    try:
        items = [call_with(name, str(tmp_path / name)) for name in ("never", "once", "always", "never")]
        assert [verdict.score for verdict in pool.evaluate(items)] == [0.5, 0.5, None, 0.5]
        assert pool.evaluate([]) == []
    finally:
        pool.close()


def test_an_item_that_overruns_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleepy.py").write_text(
        "import time\ndef judge(prompts, responses):\n    open(responses[0], 'a').write('x')\n    time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool("sleepy:judge", num_processes=1, timeout_s=0.5, memory_gib=None)
    try:
        (verdict,) = pool.evaluate([call_with("", str(tmp_path / "tries"))])
    finally:
        pool.close()
    assert (verdict.score, verdict.failure) == (None, "took over 0.5 s")
    assert (tmp_path / "tries").read_text() == "x"


def test_a_verifier_that_cannot_confirm_that_1_is_1_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("import os\ndef judge(labels, answers):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(math_match, "FUNCTION", "broken:judge")
    source = MathReward(MathSource(num_processes=1))
    try:
        with pytest.raises(RewardError, match=r"reward math: verifying 1 = 1\.0 exited with code 9 too"):
            scores(source, [r"\boxed{5}"], "72")
    finally:
        source.close()


def test_labels_must_hold_an_answer(reward: MathReward) -> None:
    with pytest.raises(DataError, match="row q7 has no label"):
        scores(reward, ["72"], None)
    # An unclosed box is no answer, and must not equal another answer that is none.
    with pytest.raises(DataError, match="without a final answer"):
        scores(reward, [r"\boxed{"], r"\boxed{72")
    assert row_problems([MathSource()], [("q7", "72 clips", {})]) == []
