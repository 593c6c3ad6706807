"""Commands as people mistype them, or as they are in other systems: each is told the right name, or none."""

from pathlib import Path

import pytest

from rlhf.cli import main as cli
from rlhf.config.commands import COMMANDS, METHODS
from rlhf.config.fields import fields_by_name
from rlhf.config.loading.load import read_config
from rlhf.config.loading.other_names import BY_LAST_PART, BY_WHOLE_NAME, NOTES, SECTIONS, WITHOUT_A_SETTING
from rlhf.config.loading.suggestions import meant_keys
from rlhf.config.tools import GenerateConfig

FLAGS: list[tuple[str, str]] = [
    # the right section, another system's name
    ("check grpo --policy.learning_rate 1", "--policy.learning-rate: unknown key. Did you mean --policy.lr?"),
    ("check ppo --critic.learning_rate 1", "--critic.learning-rate: unknown key. Did you mean --critic.lr?"),
    ("check rm --reward.learning_rate 1", "--reward.learning-rate: unknown key. Did you mean --reward.lr?"),
    ("check grpo --algo.beta 0.1", "--algo.beta: unknown key. Did you mean --algo.kl.coef?"),
    ("check dpo --algo.beta 0.1", "--algo.beta: unknown key. Did you mean --algo.loss.beta?"),
    (
        "check grpo --algo.epsilon 0.2",
        "--algo.epsilon: unknown key. Did you mean --algo.clip-low and --algo.clip-high?",
    ),
    ("check grpo --policy.rank 8", "--policy.rank: unknown key. Did you mean --policy.lora.rank?"),
    ("check grpo --rollout.num-sample 4", "--rollout.num-sample: unknown key. Did you mean --rollout.group-size?"),
    # TRL, without a section
    ("check grpo --epsilon 0.2", "--epsilon: unknown key. Did you mean --algo.clip-low and --algo.clip-high?"),
    ("check grpo --epsilon_high 0.28", "--epsilon-high: unknown key. Did you mean --algo.clip-high?"),
    ("check grpo --beta 0.04", "--beta: this command has no such setting. Did you mean --algo.kl.coef?"),
    ("check grpo --num_generations 8", "--num-generations: unknown key. Did you mean --rollout.group-size?"),
    (
        "check grpo --max_completion_length 64",
        "--max-completion-length: unknown key. Did you mean --rollout.max-response-tokens?",
    ),
    (
        "check sft --per_device_train_batch_size 8",
        "--per-device-train-batch-size: unknown key. Did you mean --train.batch-size? "
        "(it counts the examples of one optimizer step over all ranks)",
    ),
    ("check sft --num_train_epochs 3", "--num-train-epochs: unknown key. Did you mean --train.num-epochs?"),
    ("check sft --model_name_or_path x", "--model-name-or-path: unknown key. Did you mean --policy.model?"),
    ("check rm --model_name_or_path x", "--model-name-or-path: unknown key. Did you mean --reward.model?"),
    ("check grpo --reward_funcs f", "--reward-funcs: unknown key. Did you mean --reward.function?"),
    ("check sft --output_dir out", "--output-dir: unknown key. Did you mean --run.dir?"),
    ("check dpo --loss_type ipo", "--loss-type: unknown key. Did you mean --algo.loss.type?"),
    (
        "check sft --eval_strategy steps",
        "--eval-strategy: unknown key. Did you mean --eval.every-steps? (a number of steps)",
    ),
    (
        "check sft --deepspeed ds.json",
        "--deepspeed: unknown key. Did you mean --policy.zero-stage? (its value is the ZeRO stage)",
    ),
    ("check sft --packing true", "--packing: unknown key. There is no such setting. Rows are always packed;"),
    ("check sft --assistant_only_loss true", "There is no such setting. Only the assistant's tokens are learned from;"),
    ("generate m --max-new-tokens 5", "--max-new-tokens: unknown key. Did you mean --max-tokens?"),
    ("generate m --frobnicate 5", "--frobnicate: unknown key. Settings are model, prompt, prompts, template,"),
    (
        "check grpo --rollout.distributed_executor_backend ray",
        "Did you mean --rollout.num-nodes-per-engine? (an engine over several nodes has vLLM's own processes (mp)",
    ),
    (
        "check grpo actor_rollout_ref.rollout.pipeline_model_parallel_size=2",
        "pipeline_model_parallel_size=2: unexpected argument. Did you mean --rollout.pipeline-parallel-size?",
    ),
    (
        "check grpo actor_rollout_ref.rollout.data_parallel_size=2",
        "Did you mean --rollout.num-engines? (engines do not depend on each other: several of them are data",
    ),
    (
        "check grpo --rollout.data_parallel_size 2",
        "--rollout.data-parallel-size: unknown key. Did you mean --rollout.num-engines?",
    ),
    (
        "check grpo --rollout.enable_expert_parallel true",
        "--rollout.enable-expert-parallel: unknown key. Did you mean --rollout.expert-parallel?",
    ),
    (
        "check grpo actor_rollout_ref.rollout.expert_parallel_size=8",
        "Did you mean --rollout.expert-parallel? (its value is true or false, and experts are divided among",
    ),
    # verl, as flags and in its own form
    (
        "check grpo --actor_rollout_ref.actor.optim.lr 1e-6",
        "--actor-rollout-ref.actor.optim.lr: unknown key. Did you mean --policy.lr?",
    ),
    (
        "check grpo actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.n=8: unexpected argument. Did you mean --rollout.group-size?",
    ),
    (
        "check grpo actor_rollout_ref.actor.kl_loss_coef=0.001",
        "actor_rollout_ref.actor.kl_loss_coef=0.001: unexpected argument. Did you mean --algo.kl.coef?",
    ),
    (
        "check grpo algorithm.adv_estimator=grpo",
        "algorithm.adv_estimator=grpo: unexpected argument. Did you mean --algo.type?",
    ),
    (
        "check grpo +trainer.total_epochs=15",
        "+trainer.total_epochs=15: unexpected argument. Did you mean --train.num-epochs?",
    ),
    (
        "check grpo trainer.n_gpus_per_node=8",
        "trainer.n_gpus_per_node=8: unexpected argument. Did you mean --policy.num-gpus-per-node?",
    ),
    ("check ppo critic.optim.lr=1e-5", "critic.optim.lr=1e-5: unexpected argument. Did you mean --critic.lr?"),
    ("check grpo policy.lr=1e-6", "policy.lr=1e-6: unexpected argument. Write --policy.lr 1e-6."),
    # misspelled
    ("check grpo --policy.lrr 1", "--policy.lrr: unknown key. Did you mean --policy.lr?"),
    ("check grpo --polcy.lr 1", "--polcy.lr: unknown key. Did you mean --policy.lr?"),
    ("check grpo --resum", "--resum: unknown key. Did you mean --checkpoint.resume?"),
    (
        "check grpo --batch_size 4",
        "--batch-size: unknown key. Did you mean --train.batch-size or --rollout.batch-size?",
    ),
    (
        "check ppo --train.num_step 4",
        "--train.num-step: unknown key. Did you mean --train.num-steps?",
    ),
    # commands
    ("ppo x.yaml", "Did you mean `rlhf train ppo`?"),
    ("dappo x.yaml", "Did you mean `rlhf train dapo`?"),
    ("trian ppo", "Did you mean train?"),
    ("train pppo", "Did you mean ppo?"),
    ("TRAIN ppo", "Did you mean train?"),
    ("train SFT", "Did you mean sft?"),
    ("train online_dpo", "Did you mean online-dpo?"),
    ("check run.yaml", "The method comes before the file: `rlhf check METHOD run.yaml`."),
    # words without a flag, or under a flag that is none here
    ("check sft --config run.yaml", "--config: a config file is named without a flag. Write run.yaml alone."),
    ("check sft --config=run.yaml", "--config: a config file is named without a flag. Write run.yaml alone."),
    ("check sft -c run.yaml", "-c: a config file is named without a flag. Write run.yaml alone."),
    ("plan sft --config run.yaml", "--config: a config file is named without a flag. Write run.yaml alone."),
    ("check sft rows.jsonl", "rows.jsonl: unexpected argument. Write --data.path rows.jsonl."),
    ("data prompts rows.jsonl", "rows.jsonl: unexpected argument. Write --data.path rows.jsonl."),
    ("data prompts openai/gsm8k", "openai/gsm8k: unexpected argument. Write --data.path openai/gsm8k."),
    ("data sft", "data: sft is a method, whose rows are demonstrations. Write `rlhf data demonstrations ...`."),
    ("data simpo", "data: simpo is a method, whose rows are preferences. Write `rlhf data preferences ...`."),
    ("generate model Once", "Once: unexpected argument. Write --prompt Once."),
    (
        "check sft --policy.gradient-checkpointing full",
        "full: unexpected argument. --policy.gradient-checkpointing takes true, false, on, off, yes, no, 1, 0, "
        "offload, or nothing for true.",
    ),
    (
        "check sft --data.path a.jsonl --data.path b.jsonl",
        "warning: --data.path: given twice; b.jsonl is read, a.jsonl is not. Name one path, a folder or a glob.",
    ),
    ("check grpo --reward.rules maths", 'length or overlong (got "maths"). Did you mean math?'),
]

ONLY_LINE = [
    ("data prompts rows.jsonl", "rows.jsonl: unexpected argument. Write --data.path rows.jsonl."),
    ("data prompts org/rows", "org/rows: unexpected argument. Write --data.path org/rows."),
    ("generate model Once", "Once: unexpected argument. Write --prompt Once."),
    ("check sft missing.jsonl", "missing.jsonl: unexpected argument. Write --data.path missing.jsonl."),
]
"""Mistakes that explain what else is missing."""

NOTHING_MEANT = [
    "check grpo --policy.vocabulary 5",
    "check grpo --policy.path x",
    "check grpo --cluster.zero_stage 3",
    "check grpo --eval.model x",
    "check grpo --frobnicate 1",
    "check grpo --optim.fused true",
    "check grpo --run.lr 1",
    "check grpo --num_workers 4",
]
"""Nothing that is alike is what was meant."""


@pytest.mark.parametrize(("command", "line"), FLAGS, ids=[command for command, _ in FLAGS])
def test_a_mistaken_command_is_told_the_right_name(
    command: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(("command", "line"), ONLY_LINE)
def test_a_mistake_is_one_line(
    command: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    assert capsys.readouterr().err == f"rlhf: error: {line}\n"


def test_the_file_of_a_config_flag_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it sets is not missing."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("policy:\n  model: org/model\ndata:\n  path: org/rows\n")
    for words in (["--config", "run.yaml"], ["--config=run.yaml"], ["-c", "run.yaml"]):
        assert cli.main(["check", "sft", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("a config file is named without a flag. Write run.yaml alone.")


@pytest.mark.parametrize(
    ("word", "value"), [("on", True), ("1", True), ("Yes", True), ("off", False), ("0", False), ("offload", "offload")]
)
def test_a_switch_takes_the_usual_words(word: str, value: bool | str) -> None:
    for words in (["--policy.gradient-checkpointing", word], [f"--policy.gradient-checkpointing={word}"]):
        merged = read_config("sft", [*words, "--data.path", "org/rows", "--policy.model", "org/model"], {})
        assert merged.problems == []
        assert merged.config is not None
        assert merged.config.models["policy"].model_dump()["gradient_checkpointing"] == value
    variable = {"RLHF__POLICY__GRADIENT_CHECKPOINTING": word}
    merged = read_config("sft", ["--data.path", "org/rows", "--policy.model", "org/model"], variable)
    assert merged.config is not None
    assert merged.config.models["policy"].model_dump()["gradient_checkpointing"] == value


@pytest.mark.parametrize("verb", ["train", "check", "plan", "chaos", "generate", "sample", "data"])
def test_a_command_without_anything_to_do_shows_its_usage_and_fails(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Usage: rlhf {verb} ")
    assert shown.err == f"rlhf: error: {verb}: nothing is named; the usage is above.\n"
    assert cli.main([verb, "--help"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", NOTHING_MEANT)
def test_nothing_is_suggested_where_nothing_is_alike(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert "unknown key. Se" in first, "the settings of the section, or the sections, are listed"
    assert "Did you mean" not in first


YAML = [
    ("policy:\n  model: x\n   lr: 1e-6\n", ":3:6: not valid YAML: bad indentation: `lr` is indented further than"),
    (
        "policy:\n   model: x\n  lr: 1e-6\n",
        ":3:3: not valid YAML: bad indentation; the keys of a section must line up.",
    ),
    ("policy:\n\tmodel: x\n", ":2:1: not valid YAML: found a tab; indent with spaces."),
    (
        "policy:\n  model:x\n  lr: 1\n",
        ":3:5: not valid YAML: the line above, `model:x`, needs a space after its colon.",
    ),
    ("run:\n  name: a: b\n", ":2:10: not valid YAML: a second colon; quote the text."),
    ("rollot:\n  temperature: 1\n", ":2: rollot.temperature: unknown key. Did you mean rollout.temperature?"),
    ("learning_rate: 1e-6\n", ":1: learning_rate: unknown key. Did you mean policy.lr?"),
    ("actor:\n  lr: 1e-6\n", ":2: actor.lr: unknown key. Did you mean policy.lr?"),
    ("policy:\n  optimizer: adam\n", ":2: policy.optimizer: unknown key. Settings of policy are model, dtype,"),
]


@pytest.mark.parametrize(("text", "line"), YAML)
def test_a_slip_in_a_file_is_named(
    text: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    assert cli.main(["check", "grpo", "run.yaml"]) == 2
    assert f"rlhf: error: run.yaml{line}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["missing.yaml"], "rlhf: error: missing.yaml: cannot be read: No such file or directory.\n"),
        (
            ["--data.path", "missing.jsonl", "--policy.model", "org/model"],
            "rlhf: error: data: missing.jsonl matches no file.\n",
        ),
    ],
)
def test_a_missing_file_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the file would have set, or how many rows it would have had, is not asked for."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "sft", *argv]) in {2, 3}
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", [*BY_LAST_PART, *BY_WHOLE_NAME])
def test_every_name_of_another_system_stands_for_a_setting(name: str) -> None:
    """And that setting is suggested in each command that has it."""
    configs = [GenerateConfig, *(method.config for method in METHODS.values())]
    keys = {key for config in configs for key in fields_by_name(config)}
    candidates = BY_WHOLE_NAME.get(name) or BY_LAST_PART[name]
    assert all(part in keys for names in candidates for part in names.split(" & "))
    for command in COMMANDS.values():
        known = fields_by_name(command.config)
        possible = [names for names in candidates if all(part in known for part in names.split(" & "))]
        if possible and name not in known:
            assert meant_keys(name, known) == possible[:1]


def test_the_tables_fit_together() -> None:
    assert NOTES.keys() <= BY_LAST_PART.keys()
    assert not WITHOUT_A_SETTING.keys() & BY_LAST_PART.keys()
    sections = {key.partition(".")[0] for method in METHODS.values() for key in fields_by_name(method.config)}
    assert set(SECTIONS.values()) <= sections
    assert not SECTIONS.keys() & sections
