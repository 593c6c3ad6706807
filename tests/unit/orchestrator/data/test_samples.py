"""The file of samples: whole chunks, continued where a crash tore it, refused where it is another one."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.config.loading.load_tools import load_sample
from rlhf.errors import CheckpointError, ConfigError
from rlhf.orchestrator.data.curation import Row
from rlhf.orchestrator.data.samples import SampleFile, is_finished, make_requests, sample_row, settings_of
from rlhf.types import FinishReason, Json, Prompt, Reward, Rollout, Sampling

CHUNKS = [["a/0", "a/1"], ["b/0", "b/1"], ["c/0"]]
SETTINGS: dict[str, Json] = {"seed": 0, "prompts": "0" * 64, "num_answers": 5}


def row(row_id: str) -> Row:
    return {"id": row_id, "response": f"é {row_id}\n"}


def write(path: Path, settings: dict[str, Json] | None = None, *, until: int = 3) -> None:
    with SampleFile.open(path, settings or SETTINGS, CHUNKS) as file:
        for chunk in CHUNKS[file.num_chunks : until]:
            file.append([row(row_id) for row_id in chunk])


def prompt(prompt_id: str, **metadata: Json) -> Prompt:
    return Prompt(id=prompt_id, token_ids=np.array([1, 2]), text="shown", label="7", metadata=metadata)


def test_a_file_torn_at_any_byte_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.jsonl"
    write(path)
    whole = path.read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == ["a/0", "a/1", "b/0", "b/1", "c/0"]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert is_finished(path) == (size == len(whole))
        write(path)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-30] + b"\0" * 29 + b"\n")  # what a power cut may leave
    write(path)
    assert path.read_bytes() == whole


def test_only_whole_chunks_count_as_done(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path, until=2)
    assert not is_finished(path)
    path.write_bytes(path.read_bytes() + b'{"id": "c/0"')
    with SampleFile.open(path, SETTINGS, CHUNKS) as file:
        assert file.num_chunks == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with SampleFile.open(path, SETTINGS, CHUNKS) as file:
        assert file.num_chunks == 1
        assert path.read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize("settings", [b"[]", b"7", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_whose_settings_are_damaged_is_not_finished(settings: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path)
    settings_of(path).write_bytes(settings)
    assert not is_finished(path)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path, until=1)
    with pytest.raises(ConfigError) as error:
        write(path, {"prompts": "1" * 64, "num_answers": 9, "temperature": 0.5})
    advice = "Choose another file, or the same settings."
    assert error.value.problems == (
        f"--out: {path} was made with other prompts. {advice}",
        f"--out: {path} was made with seed 0, now null. {advice}",
        f"--out: {path} was made with temperature null, now 0.5. {advice}",
    )
    assert len(path.read_text().splitlines()) == 2


def test_a_file_of_another_program_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(ConfigError, match="exists and holds no samples of ours"):
        write(path)
    assert path.read_text() == '{"prompt": "mine"}\n'
    path.write_text("")  # what a crash before the settings leaves
    write(path)
    assert is_finished(path)


def test_settings_may_change_before_the_first_chunk(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path, {"seed": 9}, until=0)
    write(path)
    assert json.loads(settings_of(path).read_text()) == SETTINGS


def test_rows_that_were_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(ConfigError, match=r's.jsonl:2 is "b/0", not "a/1": the file was changed.'):
        write(path)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match=r"holds more than 5 rows"):
        write(path)
    settings_of(path).write_text("{")
    with pytest.raises(ConfigError, match=r"s.jsonl.settings is damaged"):
        write(path)


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile.open(path, SETTINGS, CHUNKS), pytest.raises(ConfigError, match="being written by another command"):
        write(path)
    write(path)


def test_errors_of_the_disk_are_checkpoint_errors_and_others_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "s.jsonl")
    with pytest.raises(TimeoutError), SampleFile.open(tmp_path / "s.jsonl", SETTINGS, CHUNKS):
        raise TimeoutError


def test_a_request_depends_on_seed_prompt_and_number_alone() -> None:
    sampling = Sampling(max_tokens=4)
    both = make_requests([prompt("a"), prompt("b")], 2, 7, sampling)
    assert [request.id for request in both] == ["a/0", "a/1", "b/0", "b/1"]
    assert len({request.seed for request in both}) == 4
    assert [request.seed for request in make_requests([prompt("b")], 3, 7, sampling)][:2] == [r.seed for r in both[2:]]
    assert make_requests([prompt("a")], 1, 8, sampling)[0].seed != both[0].seed


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [({"level": 2}, "shown"), ({"level": 2, "messages": [{"role": "user", "content": "u"}]}, None)],
)
def test_a_row_holds_the_request_and_its_origin(metadata: dict[str, Json], shown: str | None) -> None:
    asked = prompt("a", **metadata)
    (request,) = make_requests([asked], 1, 0, Sampling(max_tokens=4))
    rollout = Rollout(
        id=request.id,
        prompt_id="a",
        token_ids=np.array([5, 1]),
        log_probs=np.zeros(2, dtype=np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=0,
    )
    assert sample_row(asked, request, rollout, "x", Reward(total=0.0, parts={"f": 0.0}), "m") == {
        "id": "a/0", "prompt": shown or metadata["messages"], "response": "x", "reward": 0.0, "parts": {"f": 0.0},
        "num_tokens": 2, "finish_reason": "stop", "seed": request.seed, "model": "m", "label": "7",
        "metadata": {"level": 2},
    }  # fmt: skip
    assert sample_row(asked, request, rollout, "x", None, "m")["reward"] is None


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (
            ["--seed", "1"],
            [
                "model: missing; name a model, a folder or a hub name.",
                "out: missing; name the file of samples, as --out samples.jsonl.",
                "data.path: missing; name a file, a folder or a hub data set.",
            ],
        ),
        (
            ["m", "--out", "s.jsonl", "--data.path", "p.jsonl", "--temperature", "0"],
            ["--temperature: 0 makes all 4 responses to a prompt equal; need > 0, or num_samples 1."],
        ),
        (["m", "--out", "s.csv", "--data.path", "p.jsonl"], ['--out: must end in .jsonl (got "s.csv").']),
        (
            ["m", "n", "--out", "s.jsonl", "--data.path", "p.jsonl"],
            ['n: unexpected argument. Flags start with "--"; one file that ends in .yaml may come before them.'],
        ),
        (
            ["m", "--out", "s.jsonl", "--data.path", "p", "--num-sample", "2"],
            ["--num-sample: unknown key. Did you mean --num-samples?"],
        ),
    ],
)
def test_wrong_arguments_get_a_line_each(
    arguments: list[str], complaints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [f"rlhf: error: {line}" for line in complaints]


def test_a_file_sets_what_flags_do_not(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: a\nnum_samples: 3\nreward: {sources: [{type: function, function: 'm:f', weight: 2}]}\n")
    config = load_sample([str(file), "--num-samples", "2", "--out", "s.jsonl", "--data.path", "p"], {})
    assert (config.model, config.num_samples) == ("a", 2)
    assert [source.weight for source in config.reward.all_sources] == [2.0]
    assert load_sample(["b", str(file), "--out", "s.jsonl", "--data.path", "p"], {}).model == "b"
