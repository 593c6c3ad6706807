"""OpenRLHF's dotted flags: which are read as its own, what they become together, and its published launches."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.algo import DpoSection, GrpoSection, PpoSection
from rlhf.config.commands import METHODS, DpoConfig, GrpoConfig, PpoConfig, RmConfig, SftConfig, TrainConfig
from rlhf.config.fields import fields_by_name
from rlhf.config.loading.load import load_config
from rlhf.config.loading.openrlhf import Translation, translate
from rlhf.errors import ConfigError
from tests.unit.config.conftest import Problems
from tests.unit.planning.support import LLAMA_3_8B

ACTOR = ("--actor.model_name_or_path", "m", "--data.prompt_dataset", "org/rows")
PPO = (*ACTOR, "--reward.model_name_or_path", "r")
GRPO = (*PPO, "--rollout.n_samples_per_prompt", "8")
PAIRS = ("--model.model_name_or_path", "m", "--data.dataset", "org/rows")
ALL_GPUS = {"sft": ("--policy.num-gpus-per-node", "8"), "rm": ("--reward.num-gpus-per-node", "8")} | {
    "dpo": ("--policy.num-gpus-per-node", "8", "--reference.num-gpus-per-node", "8", "--colocate", "policy,reference")
}
"""What the launcher of these commands decides there: how many GPUs there are."""


@dataclass(frozen=True)
class Launch:
    """The flags of one of the launch scripts that OpenRLHF publishes."""

    command: str
    flags: Mapping[str, Sequence[str]]

    def argv(self, *, without: Sequence[str] = ()) -> list[str]:
        given = {name: words for name, words in self.flags.items() if name not in without}
        return [word for name, words in given.items() for word in (f"--{name}", *words)]


def read_launches() -> dict[str, Launch]:
    text = Path(__file__).with_name("openrlhf_launches.json").read_text(encoding="utf-8")
    return {name: Launch(launch["command"], launch["flags"]) for name, launch in json.loads(text).items()}


LAUNCHES = read_launches()
REFUSED = {
    "grpo: prorl": "reward.stop_properly_penalty_coef",
}
"""Launches with a flag that is refused, since it changes what is learned and has no counterpart."""


def translated(command: str, *argv: str) -> Translation:
    return translate(argv, fields_by_name(METHODS[command].config))


def config_of(command: str, *argv: str) -> TrainConfig:
    return load_config(command, argv, {})


ROOM = {"grpo: reinforce baseline with agents": ["--policy.swap-optimizer", "true"]}
"""The launches whose engines take most of a GPU, beside optimizer states that OpenRLHF moves to the host meanwhile."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_published_launch_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    model.joinpath("config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")
    launch = LAUNCHES[name]
    argv = launch.argv(without=[REFUSED.get(name, "")])
    agents = tmp_path / "folder" / "agent_func.py"
    agents.parent.mkdir()
    agents.touch()
    cluster = ["--cluster", "4x8xH200"]
    code = main(["plan", launch.command, *argv, *ROOM.get(name, ()), *ALL_GPUS.get(launch.command, ()), *cluster])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    assert "rlhf: the same command: rlhf plan" in err
    assert "0123456789" not in err


@pytest.mark.parametrize(("name", "flag"), REFUSED.items())
def test_a_published_launch_is_refused_for_what_is_not_here(name: str, flag: str, problems: Problems) -> None:
    launch = LAUNCHES[name]
    [problem] = problems(*launch.argv(), command=launch.command)
    assert problem.startswith(f"--{flag}: ")


def test_a_hybrid_ppo_launch() -> None:
    config = config_of("ppo", *LAUNCHES["ppo: hybrid engine"].argv())
    assert isinstance(config, PpoConfig)
    models = [config.policy, config.reference, config.critic, config.reward]
    assert [model.num_ranks for model in models] == [8] * 4
    assert {model.dtype for model in models} == {"bfloat16"}
    assert config.cluster.colocate == ("all",)
    assert (config.policy.lr, config.critic.lr, config.policy.zero_stage) == (5e-7, 9e-6, 3)
    assert (config.policy.gradient_checkpointing, config.critic.gradient_checkpointing) == (True, True)
    assert (config.rollout.num_engines, config.rollout.tensor_parallel_size) == (4, 2)
    assert (config.rollout.batch_size, config.rollout.group_size, config.train.batch_size) == (1024, 1, 128)
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (1024, 1024)
    assert config.train.max_tokens_per_micro_batch == 16384
    assert (config.data.path, config.data.split) == ("org/prompts", "train[:100000]")
    assert (config.data.prompt_key, config.data.template) == ("context_messages", "chat")
    assert isinstance(config.algo, PpoSection)
    assert (config.algo.kl.coef, config.algo.normalize_rewards) == (0.01, True)
    assert config.algo.correction.type == "truncate"


def test_a_dapo_launch() -> None:
    config = config_of("grpo", *LAUNCHES["grpo: dapo"].argv())
    assert isinstance(config, GrpoConfig)
    algo = config.algo
    assert isinstance(algo, GrpoSection)
    assert (algo.dynamic_sampling, algo.kl_placement, algo.kl_estimator) == (True, "loss", "k3")
    assert (algo.clip_low, algo.clip_high, algo.kl.coef) == (0.2, 0.27, 1e-3)
    assert config.reward.function == "reward_func:reward_func"
    assert (config.checkpoint.every_steps, config.train.micro_batch_size) == (20, 8)


def test_supervised_launches() -> None:
    sft = config_of("sft", *LAUNCHES["sft"].argv())
    assert isinstance(sft, SftConfig)
    assert (sft.policy.lr, sft.policy.zero_stage, sft.policy.attention) == (5e-6, 2, "flash_attention_2")
    assert (sft.data.prompt_key, sft.data.response_key, sft.data.max_tokens) == ("question", "response", 2048)
    assert (sft.train.batch_size, sft.train.micro_batch_size, sft.checkpoint.resume) == (256, 2, True)
    rm = config_of("rm", *LAUNCHES["rm"].argv())
    assert isinstance(rm, RmConfig)
    assert (rm.reward.model, rm.reward.lr, rm.reward.gradient_checkpointing) == ("model", 9e-6, True)
    assert (rm.data.chosen_key, rm.data.rejected_key, rm.data.max_tokens) == ("chosen", "rejected", 8192)
    dpo = config_of("dpo", *LAUNCHES["dpo"].argv())
    assert isinstance(dpo, DpoConfig)
    assert isinstance(dpo.algo, DpoSection)
    assert (dpo.algo.loss.beta, dpo.policy.lr, dpo.policy.zero_stage) == (0.1, 5e-7, 3)


@pytest.mark.parametrize(
    ("argv", "is_theirs"),
    [
        ("--algo.kl.target 6", False),
        ("--algo.kl.target 6 --pretrain m", False),
        ("--algo.kl.target 6 --rollout.batch_size 8 --critic.num_nodes 1", False),
        ("--algo.kl.target 6 --actor.num_nodes 1", True),
        ("--algo.kl.target 6 --actor.num_nodes=1", True),
        ("--openrlhf --algo.kl.target 6", True),
        ("--set algo.kl.target=6 --actor.num_nodes 1", False),
    ],
)
def test_flags_of_both_are_theirs_only_beside_one_that_is_theirs_alone(argv: str, *, is_theirs: bool) -> None:
    translation = translated("ppo", *shlex.split(argv))
    assert any("--algo.kl.target: it counts nats a token" in line for line in translation.problems) == is_theirs
    assert "--openrlhf" not in translation.argv


def test_a_key_of_ours_can_be_set_beside_theirs() -> None:
    ours = ("--set", "algo.kl.type=adaptive", "--set", "algo.kl.target=6", "--policy.lr", "1e-5")
    config = config_of("ppo", *PPO, *ours)
    assert isinstance(config, PpoConfig)
    assert isinstance(config.algo, PpoSection)
    assert (config.algo.kl.model_dump()["target"], config.policy.lr) == (6.0, 1e-5)


def test_the_last_of_a_repeated_flag_counts_and_two_flags_may_not_disagree(problems: Problems) -> None:
    assert translated("sft", "--ds.zero_stage", "2", "--ds.zero_stage", "3").argv == ["--policy.zero-stage", "3"]
    assert problems(*PPO, "--actor.eps_clip", "0.1", "--actor.eps_clip_low_high", "0.1", "0.3") == [
        "--actor.eps_clip_low_high: would set algo.clip_high to 0.3, and --actor.eps_clip sets it to 0.1. Leave one of "
        "them out."
    ]


@pytest.mark.parametrize(
    ("command", "argv", "own"),
    [
        ("ppo", "--actor.adam.betas 0.9 0.99", "--policy.adam-betas '[0.9, 0.99]'"),
        ("ppo", "--reward.clip_range -5 5.0", "--algo.clip-rewards 5"),
        ("ppo", "--critic.lr_scheduler linear", "--critic.lr-schedule linear --critic.min-lr-ratio 0"),
        ("ppo", "--critic.freezing_steps 20", "--algo.critic-warmup-steps 20"),
        ("ppo", "--data.max_len 101", "--rollout.max-prompt-tokens 50 --rollout.max-response-tokens 51"),
        (
            "ppo",
            "--data.max_len 100 --rollout.max_new_tokens 64",
            "--rollout.max-prompt-tokens 36 --rollout.max-response-tokens 64",
        ),
        ("ppo", "--train.async_enable --train.async_queue_size 3", "--rollout.max-lag 3"),
        (
            "grpo",
            "--train.async_enable --train.colocate_all",
            "--rollout.max-lag 1 --cluster.colocate policy,reference,critic,reward",
        ),
        ("grpo", "--actor.policy_loss_type gspo", "--algo.ratio sequence-mean --algo.aggregation seq-mean-token-mean"),
        ("grpo", "--algo.advantage.estimator rloo", "--algo.type rloo"),
        ("grpo", "--algo.kl.init_coef 0.01", "--algo.kl.coef 0.01 --algo.kl-placement reward"),
        ("grpo", "--algo.kl.init_coef 0.0", "--algo.kl.coef 0.0"),
        (
            "grpo",
            "--algo.kl.use_loss --algo.kl.init_coef 0.01",
            "--algo.kl-placement loss --algo.kl.coef 0.01",
        ),
        ("grpo", "--reward.overlong_buffer_len 4096.0", "--algo.overlong-buffer 4096"),
        ("grpo", "--critic.adam.lr 1e-5 --critic.num_nodes 2 --train.colocate_critic_reward", ""),
        ("grpo", "--train.dynamic_batch_enable --train.micro_batch_size 1", ""),
        (
            "grpo",
            "--algo.advantage.is_correction_level token --algo.advantage.is_correction_threshold 0.5 5.0",
            "--algo.correction.type mask --algo.correction.low 0.5 --algo.correction.high 5",
        ),
        (
            "ppo",
            "--algo.advantage.is_correction_level token --algo.advantage.is_correction_mode clip "
            "--algo.advantage.is_correction_threshold 2",
            "--algo.correction.type truncate --algo.correction.cap 2",
        ),
        ("ppo", "--algo.advantage.is_correction_level off", "--algo.correction.type none"),
        ("sft", "--ds.lora.target_modules q_proj v_proj", "--policy.lora.targets q_proj --policy.lora.targets v_proj"),
        ("sft", "--ds.lora.target_modules all-linear --ds.lora.dropout 0.0", ""),
        (
            "sft",
            "--data.input_template 'Q: {}' --max_norm 0.5",
            "--data.prompt-format 'Q: {prompt}' --policy.max-grad-norm 0.5",
        ),
        ("rm", "--model.margin_loss_enable --model.loss_type logexp", "--algo.use-margins true"),
        ("dpo", "--model.label_smoothing 0.1", "--algo.loss.type cdpo --algo.loss.label-noise 0.1"),
        ("dpo", "--model.nll_loss_coef 0.2", "--algo.loss.type rpo --algo.loss.nll-coef 0.2"),
        ("dpo", "--model.ipo_enable --model.label_smoothing 0", "--algo.loss.type ipo"),
        ("dpo", "--ref.model_name_or_path r --ref.offload", "--reference.model r --reference.offload-parameters true"),
    ],
)
def test_flags_that_become_something_else(command: str, argv: str, own: str) -> None:
    translation = translated(command, *shlex.split(argv))
    assert translation.problems == []
    assert translation.argv == shlex.split(own)


@pytest.mark.parametrize(
    ("command", "argv", "says"),
    [
        ("ppo", "--algo.advantage.estimator group_norm", "Run `rlhf train grpo`"),
        ("grpo", "--algo.advantage.estimator gae", "Run `rlhf train ppo`"),
        ("grpo", "--algo.advantage.estimator flash_reinforce", "no such method here"),
        ("ppo", "--actor.policy_loss_type gspo", "Run `rlhf train grpo`"),
        ("ppo", "--algo.dynamic_filtering_enable", "Run `rlhf train grpo`"),
        ("grpo", "--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0.2 0.8", "Use 0 1"),
        ("grpo", "--algo.advantage.gamma 0.9", "does not discount"),
        ("grpo", "--algo.advantage.is_correction_level seq", "Use token"),
        ("grpo", "--algo.advantage.is_correction_enable --algo.advantage.is_correction_type seq-mask-tis", "Use tis"),
        ("grpo", "--algo.advantage.is_correction_level token --algo.advantage.is_correction_gating tv", "Use ratio"),
        (
            "grpo",
            "--algo.advantage.is_correction_level token --algo.advantage.is_correction_threshold 2",
            "lower bound",
        ),
        ("ppo", "--reward.clip_range -5 10", "Use -10 10"),
        ("ppo", "--reward.clip_range -5", "needs 2 values (got 1)"),
        ("ppo", "--reward.remote_url http://a/,http://b/", "one address"),
        ("ppo", "--reward.remote_url my-reward.py", "no name of a Python module"),
        ("ppo", "--data.max_len 100 --rollout.max_new_tokens 100", "no room for a prompt"),
        ("ppo", "--actor.optim muon", "AdamW"),
        ("ppo", "--data.prompt_dataset a,b", "one data set"),
        ("ppo", "--data.prompt_dataset rows.jsonl --data.max_samples 10", "first rows"),
        ("sft", "--ds.param_dtype fp16", "bfloat16 or float32"),
        ("sft", "--ds.attn_implementation flash_attention_3", "must be one of"),
        ("sft", "--lr_scheduler polynomial", "must be one of"),
        ("sft", "--vllm.num_engines 2", "no such setting"),
        ("sft", "--train.async_enable", "does not sample"),
        ("dpo", "--model.ipo_enable --model.nll_loss_coef 0.1", "Leave one of them out"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(command: str, argv: str, says: str) -> None:
    [problem] = translated(command, *shlex.split(argv)).problems
    assert says in problem
    assert problem.startswith("--")


def test_a_refused_flag_does_not_cause_a_second_problem(problems: Problems) -> None:
    [problem] = problems(*ACTOR, "--reward.rules", "math", "--algo.advantage.estimator", "flash_reinforce")
    assert problem.startswith("--algo.advantage.estimator: ")


def test_a_file_of_agents_is_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.py").touch()
    config = config_of("grpo", *ACTOR, "--train.agent_func_path", "agent.py")
    assert isinstance(config, GrpoConfig)
    assert config.rollout.environment == ("openrlhf://agent.py",)
    assert [source.label for source in config.reward_sources] == ["environment"]
    with pytest.raises(ConfigError, match=r"no such file: other\.py"):
        config_of("grpo", *ACTOR, "--train.agent_func_path", "other.py")


def test_a_key_for_a_tracker_is_never_shown() -> None:
    translation = translated("sft", *PAIRS, "--logger.wandb.key", "0123456789")
    assert translation.problems == []
    assert not [line for line in (*translation.lines, *translation.argv) if "0123456789" in line]


def test_an_estimator_without_a_critic_is_a_type_of_grpo() -> None:
    config = config_of("grpo", *GRPO, "--algo.advantage.estimator", "reinforce_baseline", "--actor.entropy_coef", "0.0")
    assert isinstance(config, GrpoConfig)
    assert config.algo.type == "reinforce++-baseline"
