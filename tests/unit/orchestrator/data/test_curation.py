"""What is chosen from scored samples, by hand-made tables."""

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.data import DataSection
from rlhf.orchestrator.data.curation import (
    BELOW,
    CLOSE,
    EMPTY,
    LONELY,
    REPEATED,
    SURPLUS,
    TIED,
    TRUNCATED,
    Sample,
    condition,
    describe,
    pair,
    select,
)
from rlhf.orchestrator.data.samples import read_samples
from rlhf.types import Json
from tests.unit.orchestrator.data.data_support import CHAT, PLAIN, load_demonstrations, load_preferences, write_rows

CHAT_PROMPT: Json = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def sample(prompt: Json, response: str, reward: float, *, truncated: bool = False, sample_id: str = "") -> Sample:
    return Sample(
        id=sample_id or f"{prompt}-{response}",
        prompt=prompt,
        response=response,
        reward=reward,
        truncated=truncated,
        row={"model": "m", "seed": 3, "label": "7", "id": "old"},
    )


SAMPLES = [
    sample("p", "bad", 0.0),
    sample("p", "good", 1.0),
    sample("q", "fair", 0.5),
    sample("p", "also  good", 1.0),
    sample("p", "also good ", 0.75),
    sample("q", "poor", 0.25),
]


def answers(rows: tuple[dict[str, Json], ...]) -> list[Json]:
    return [row["response"] for row in rows]


def test_best_of_n_keeps_the_first_of_the_best_of_each_prompt() -> None:
    curated = select(SAMPLES, max_per_prompt=1)
    assert answers(curated.rows) == ["good", "fair"]
    assert curated.dropped == {REPEATED: 1, SURPLUS: 3}
    assert curated.rows[0] == {
        "id": "p-good", "prompt": "p", "response": "good", "reward": 1.0, "model": "m", "seed": 3, "label": "7",
    }  # fmt: skip


def test_rejection_keeps_every_different_response_from_the_threshold_on() -> None:
    curated = select(SAMPLES, threshold=0.5)
    assert answers(curated.rows) == ["good", "also  good", "fair"]
    assert curated.dropped == {BELOW: 2, REPEATED: 1}
    assert answers(select(SAMPLES, threshold=0.51, max_per_prompt=1).rows) == ["good"]


def test_a_quantile_is_one_of_all_rewards_that_could_be_kept() -> None:
    cut = sample("q", "long", 50.0, truncated=True)
    assert answers(select([*SAMPLES, cut], quantile=1.0).rows) == ["good", "also  good"]
    assert answers(select([*SAMPLES, cut], quantile=0.0).rows) == ["good", "also  good", "bad", "fair", "poor"]
    assert answers(select([*SAMPLES, cut], quantile=0.5).rows) == ["good", "also  good"]  # the median is 0.625


def test_empty_and_truncated_responses_are_left_out_and_counted() -> None:
    wrong = [sample("p", " \n", 9.0), sample("p", "cut o", 9.0, truncated=True), sample("p", "whole", 1.0)]
    curated = select(wrong)
    assert (answers(curated.rows), curated.dropped) == (["whole"], {EMPTY: 1, TRUNCATED: 1})
    assert answers(select(wrong, keep_truncated=True).rows) == ["cut o", "whole"]


def test_nothing_to_choose_from_is_nothing() -> None:
    for curated in (select([], quantile=0.5), condition([], prompt_format="{prompt}{reward}"), pair([])):
        assert (curated.rows, curated.dropped) == ((), {})
    assert describe([]) == {}


def test_the_reward_is_written_into_the_prompt_on_a_scale_from_0_to_1() -> None:
    samples = [sample("p", "a", -2.0), sample("p", "b", 2.0), sample(CHAT_PROMPT, "c", 1.0)]
    curated = condition(samples, prompt_format="<{reward:.2f}> {prompt}")
    shown = [("b", "<1.00> p"), ("a", "<0.00> p")]
    assert [(row["response"], row["prompt"]) for row in curated.rows[:2]] == shown
    assert curated.rows[2]["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "<0.75> u"}]
    assert [row["reward_shown"] for row in curated.rows] == [1.0, 0.0, 0.75]
    assert [row["reward"] for row in curated.rows] == [2.0, -2.0, 1.0]
    parts: list[Json] = [{"from": "human", "value": [{"type": "text", "text": "u"}, "v"]}]
    (row,) = condition([sample(parts, "c", 1.0)], prompt_format="{reward:g} {prompt}").rows
    assert row["prompt"] == [{"from": "human", "content": "1 uv"}]
    equal = condition([sample("p", "a", 3.0)], prompt_format="{reward:g} {prompt}")
    assert equal.rows[0]["prompt"] == "1 p"


def test_a_pair_is_the_best_response_against_the_worst() -> None:
    curated = pair(SAMPLES)
    assert [(row["chosen"], row["rejected"]) for row in curated.rows] == [("good", "bad"), ("fair", "poor")]
    assert curated.rows[0] == {
        "id": "p-good", "rejected_id": "p-bad", "prompt": "p", "chosen": "good", "rejected": "bad",
        "score_chosen": 1.0, "score_rejected": 0.0, "model": "m", "label": "7",
    }  # fmt: skip
    assert curated.dropped == {}


def test_prompts_without_an_order_give_no_pair_and_are_counted() -> None:
    samples = [
        sample("tied", "a", 0.0), sample("tied", "b", 0.0),
        sample("lonely", "a", 1.0),
        sample("close", "a", 0.1), sample("close", "b", 0.2),
        sample("same", "a  b", 3.0), sample("same", "a b", 1.0),
        sample("cut", "a", 3.0), sample("cut", "b", 1.0, truncated=True),
        sample("fine", "a", 0.0), sample("fine", "b", 5.0), sample("fine", "c", 2.0),
    ]  # fmt: skip
    curated = pair(samples, min_margin=0.5)
    assert [row["prompt"] for row in curated.rows] == ["fine"]
    assert pair(samples, min_margin=5.0).rows == curated.rows
    assert curated.dropped == {TIED: 1, LONELY: 2, CLOSE: 1, REPEATED: 1, TRUNCATED: 1}


def test_the_metrics_count_every_sample() -> None:
    facts = describe([*SAMPLES, sample("q", "", 4.5, truncated=True)])
    assert facts == {
        "prompts": 2, "answers": 7, "reward": pytest.approx(8 / 7), "best_reward": pytest.approx(5.5 / 2),
        "truncated": pytest.approx(1 / 7), "empty": pytest.approx(1 / 7),
    }  # fmt: skip


def written(path: Path, samples: list[Sample]) -> Path:
    rows = [
        {"id": s.id, "prompt": s.prompt, "response": s.response, "reward": s.reward, "label": "7", "metadata": {}}
        for s in samples
    ]
    return write_rows(path, rows)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["best-of-n"], ["p", "q"]),
        (["raft", "--threshold", "0.6"], ["p"]),
        (["rejection", "--threshold", "0.25"], ["p", "p", "q", "q"]),
        (["rft", "--quantile", "0.9"], ["p", "p"]),
        (["conditional"], ["[reward 1.0] p", "[reward 1.0] p", "[reward 0.0] p", "[reward 0.5] q", "[reward 0.2] q"]),
    ],
)
def test_chosen_rows_are_demonstrations(tmp_path: Path, arguments: list[str], texts: list[str]) -> None:
    method, *options = arguments
    out = tmp_path / "sub" / "d.jsonl"
    assert main(["curate", method, str(written(tmp_path / "s.jsonl", SAMPLES)), "--out", str(out), *options]) == 0
    split = load_demonstrations(DataSection(path=str(out)), PLAIN)
    assert [group.prompt.text for group in split.train] == texts
    assert split.dropped == {}
    assert {group.prompt.label for group in split.train} == {"7"}


def test_chosen_pairs_are_preferences_also_of_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        *SAMPLES,
        sample(CHAT_PROMPT, "a", 1.0),
        sample(CHAT_PROMPT, "b", 2.0),
        sample("t", "a", 0),
    ]
    out = tmp_path / "d.jsonl"
    assert main(["curate", "pairs", str(written(tmp_path / "s.jsonl", samples)), "--out", str(out)]) == 0
    split = load_preferences(DataSection(path=str(out)), CHAT)
    assert [group.texts for group in split.train] == [("good", "bad"), ("fair", "poor"), ("b", "a")]
    assert capsys.readouterr().out.splitlines() == [
        "9 responses to 4 prompts, mean reward 0.7222, mean of the best 0.875",
        "  dropped 1: prompts with one response only",
        f"3 rows in {out}",
    ]


def test_turns_of_an_episode_are_learned_as_a_conversation(tmp_path: Path) -> None:
    """What an environment said before the first turn belongs to the prompt: pairs are of the same one."""
    rows: list[dict[str, Json]] = []
    for number, opening in enumerate(["go", "go", "other"]):
        turns: list[Json] = [
            {"role": "user", "content": opening},
            {"role": "assistant", "content": f"call {number}"},
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "left out"},
        ]
        common: dict[str, Json] = {"response": f"call {number} 4", "reward": float(number), "tools": []}
        rows.append({"id": f"r/{number}", "prompt": CHAT_PROMPT, "episode": {"messages": turns}, **common})
    (only,) = pair(read_samples(str(write_rows(tmp_path / "s.jsonl", rows)))).rows
    assert isinstance(CHAT_PROMPT, list)
    assert only["prompt"] == [*CHAT_PROMPT, {"role": "user", "content": "go"}]
    assert only["chosen"] == rows[1]["episode"]["messages"][1:4]  # type: ignore[index, call-overload]
    assert only["rejected"] == rows[0]["episode"]["messages"][1:4]  # type: ignore[index, call-overload]
    first, *_ = select(read_samples(str(tmp_path / "s.jsonl"))).rows
    assert [turn["role"] for turn in first["response"]] == ["assistant", "tool", "assistant"]  # type: ignore[index, union-attr, call-overload]
    assert "episode" not in first


def test_samples_that_are_none_are_named_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [
        {"prompt": "p", "response": "a"},
        {"prompt": "p", "response": 3, "reward": 1},
        {"prompt": "", "response": "a", "reward": 1},
        {"prompt": "p", "response": "a", "reward": True},
        {"prompt": [{"role": "bot", "content": "x"}], "response": "a", "reward": 1},
        {"prompt": "p", "response": "a", "reward": 1},
        {"prompt": "p", "response": "a", "reward": 10**400},
    ]
    path = write_rows(tmp_path / "s.jsonl", rows)
    assert main(["curate", "best-of-n", str(path), "--out", str(tmp_path / "d.jsonl")]) == 3
    need = "Give `rlhf sample` a reward source."
    assert capsys.readouterr().err.splitlines() == [
        f"rlhf: error: s.jsonl:1: reward is not a number (got null). {need}",
        "rlhf: error: s.jsonl:2: response is not text (got int).",
        "rlhf: error: s.jsonl:3: prompt is empty.",
        f"rlhf: error: s.jsonl:4: reward is not a number (got true). {need}",
        'rlhf: error: s.jsonl:5: prompt[0].role "bot" unknown.',
        f"rlhf: error: s.jsonl:7: reward is not a number (got 1{'0' * 59}...). {need}",
    ]
    assert not (tmp_path / "d.jsonl").exists()


def test_the_worst_of_a_pair_says_something_else_than_the_best() -> None:
    """A judge may score the same words differently; the prompt still has a pair."""
    group = [sample("p", "a", 1.0), sample("p", "b", 0.5), sample("p", "a ", 0.0, sample_id="p-again")]
    curated = pair(group)
    assert [(row["id"], row["rejected_id"]) for row in curated.rows] == [("p-a", "p-b")]
    assert curated.dropped == {}


def test_responses_that_a_source_left_unscored_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [
        {"id": str(number), "prompt": "p", "response": f"a{number}", "reward": reward}
        for number, reward in enumerate((None, 1.0, 0.5, None))
    ]
    path = write_rows(tmp_path / "s.jsonl", rows)
    for method, kept in (("best-of-n", ["1"]), ("conditional", ["1", "2"]), ("pairs", ["1"])):
        out = tmp_path / f"{method}.jsonl"
        assert main(["curate", method, str(path), "--out", str(out)]) == 0
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == kept
        said = capsys.readouterr().out
        assert "4 responses to 1 prompts, mean reward 0.75, mean of the best 1" in said
        assert "dropped 2: without a score" in said


def test_samples_without_any_score_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "s.jsonl", [{"prompt": "p", "response": "a", "reward": None}] * 2)
    assert main(["curate", "pairs", str(path), "--out", str(tmp_path / "d.jsonl")]) == 3
    refused = f"rlhf: error: {path}: none of 2 responses has a reward. Give `rlhf sample` a reward source.\n"
    assert capsys.readouterr().err == refused


def test_an_existing_file_and_an_empty_choice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path / "s.jsonl", SAMPLES), tmp_path / "d.jsonl"
    asked = ["curate", "rejection", str(path), "--out", str(out), "--threshold"]
    assert main([*asked, "2"]) == 3
    assert "none of the 6 samples" in capsys.readouterr().err
    assert not out.exists()
    out.write_text("mine")
    assert main([*asked, "0"]) == 2
    assert capsys.readouterr().err == f"rlhf: error: --out: {out} exists. Choose another, or --overwrite.\n"
    assert out.read_text() == "mine"
    assert main([*asked, "0", "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 5


def test_samples_of_two_files_may_have_the_same_ids(tmp_path: Path) -> None:
    written(tmp_path / "s1.jsonl", SAMPLES[:2])
    written(tmp_path / "s2.jsonl", [SAMPLES[0], SAMPLES[2]])
    out = tmp_path / "out.jsonl"
    samples = str(tmp_path / "s?.jsonl")
    assert main(["curate", "rejection", samples, "--out", str(out), "--threshold", "0"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["response"]) for row in rows] == [("p-good", "good"), ("p-bad", "bad"), ("q-fair", "fair")]
    assert load_demonstrations(DataSection(path=str(out)), PLAIN).dropped == {}


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (
            [],
            [
                "method: missing; one of best-of-n, rejection, raft, rft, conditional, pairs.",
                "samples: missing; name the file that `rlhf sample` wrote.",
                "out: missing; name the file of rows, as --out data.jsonl.",
            ],
        ),
        (
            ["rejection", "s", "--out", "d.jsonl"],
            ["threshold: missing; give the least reward of a good response (or --quantile)."],
        ),
        (
            ["best-of-n", "s", "--out", "d.jsonl", "--threshold", "1", "--quantile", "0.5", "--min-margin", "1"],
            [
                "--quantile: threshold is given too. Use one of them.",
                "--min-margin: not read by curate best-of-n. Remove it.",
            ],
        ),
        (["pairs", "s", "--out", "d.jsonl", "--threshold", "1"], ["--threshold: not read by curate pairs. Remove it."]),
        (
            ["pairs", "s", "t", "--out", "d.jsonl"],
            ['t: unexpected argument. Flags start with "--"; one file that ends in .yaml may come before them.'],
        ),
        (["pairs", "s", "--out", "d.json"], ['--out: must end in .jsonl (got "d.json").']),
        (
            ["conditional", "s", "--out", "d.jsonl", "--prompt-format", "{prompt.x} {reward}"],
            ["--prompt-format: must hold {prompt} and {reward} exactly once each, as {reward:.1f} for one digit."],
        ),
        (
            ["rejecton", "s", "--out", "d.jsonl"],
            [
                "--method: must be one of best-of-n, rejection, raft, rft, conditional, pairs "
                '(got "rejecton"). Did you mean rejection?'
            ],
        ),
    ],
)
def test_wrong_arguments_get_a_line_each(
    arguments: list[str], complaints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["curate", *(arguments or ["--quantile", "0.5"])]) == 2
    assert capsys.readouterr().err.splitlines() == [f"rlhf: error: {line}" for line in complaints]
