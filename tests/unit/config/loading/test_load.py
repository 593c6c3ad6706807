"""From layers to a config, and back to text."""

from pathlib import Path

import pytest

from rlhf.config.algo import PpoSection
from rlhf.config.commands import PpoConfig, RmConfig, SftConfig, TrainConfig
from rlhf.config.loading.load import dump_config, load_config, load_generate, read_config, short_summary
from rlhf.errors import ConfigError

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")


def ppo(*argv: str, environ: dict[str, str] | None = None) -> PpoConfig:
    config = load_config("ppo", [*argv, *RIGHT], environ or {})
    assert isinstance(config, PpoConfig)
    return config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def test_flags_override_environment_override_file_override_defaults(file: Path) -> None:
    file.write_text("policy: {lr: 2e-6, weight_decay: 0.2, adam_eps: 2e-8}\n")
    environ = {"RLHF__POLICY__LR": "3e-6", "RLHF__POLICY__WEIGHT_DECAY": "0.3"}
    policy = ppo(str(file), "--policy.lr", "4e-6", environ=environ).policy
    assert (policy.lr, policy.weight_decay, policy.adam_eps, policy.max_grad_norm) == (4e-6, 0.3, 2e-8, 1.0)


@pytest.mark.parametrize("written", ["1e-6", '"1e-6"', "1.0e-6", "0.000001", "1E-6"])
def test_a_number_in_scientific_notation_is_a_number(file: Path, written: str) -> None:
    """YAML 1.1 reads 1e-6 as text, and so does PyYAML."""
    file.write_text(f"policy: {{lr: {written}}}\n")
    assert ppo(str(file)).policy.lr == 1e-6


def test_text_is_not_mistaken_for_dates_times_octals_or_booleans(file: Path) -> None:
    file.write_text("data: {split: 2020-01-01, label_key: no, prompt_key: 1:30}\ntrain: {num_steps: 010}\n")
    config = ppo(str(file))
    assert (config.data.split, config.data.label_key, config.data.prompt_key) == ("2020-01-01", "no", "1:30")
    assert config.train.num_steps == 10


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(file: Path) -> None:
    file.write_bytes("\ufeffpolicy:\r\n  lr: 2e-6\r\n".encode())
    assert ppo(str(file)).policy.lr == 2e-6


def test_keys_may_be_dotted_and_in_kebab_case_and_sections_empty(file: Path) -> None:
    file.write_text("policy.num-nodes: 2\nrun:\ntrain: {}\nalgo.kl: {type: adaptive}\n")
    config = ppo(str(file))
    assert config.policy.num_nodes == 2
    assert isinstance(config.algo, PpoSection)
    assert config.algo.kl.type == "adaptive"


def test_environment_variables_are_put_into_the_file(file: Path) -> None:
    file.write_text(
        "data: {eval_path: '${DIR}/a', split: '$${DIR}'}\ntrain: {num_steps: '${N}'}\npolicy: {zero_stage: '${Z}'}\n"
    )
    config = ppo(str(file), environ={"DIR": "/d", "N": "7", "Z": "2"})
    assert (config.data.eval_path, config.data.split) == ("/d/a", "${DIR}")
    assert (config.train.num_steps, config.policy.zero_stage) == (7, 2)


def test_flags_in_every_spelling() -> None:
    config = ppo(
        "--policy.num-nodes=2", "--policy.num_gpus_per_node", "3", "--set", "policy.zero-stage=2", "--resume",
        "--no-log.tensorboard", "--log.rollouts", "false", "--algo.token-level=false", "--run-name", "a",
        "--algo.kl.type", "adaptive", "--algo.kl.target", "3", "--colocate", "policy, reference",
        "--colocate", "critic,reward", "--reference.num-nodes", "2", "--reference.num-gpus-per-node", "3",
        "--policy.adam-betas", "0.8,0.9", "--data.prompt-format", "Question: {prompt}", "--debug",
        "--train.num-steps", "null", "--train.max-tokens-per-micro-batch", "1e3",
    )  # fmt: skip
    assert (config.policy.num_nodes, config.policy.num_gpus_per_node, config.policy.zero_stage) == (2, 3, 2)
    assert ppo("--resume", "auto").checkpoint.resume == "auto"
    assert ppo("--resume", "false").checkpoint.resume is False
    assert (config.checkpoint.resume, config.log.tensorboard, config.log.rollouts) == (True, False, False)
    assert isinstance(config.algo, PpoSection)
    assert (config.algo.token_level, config.cluster.debug, config.run.name) == (False, True, "a")
    assert config.algo.kl.model_dump() == {"type": "adaptive", "coef": 0.01, "target": 3.0, "horizon": 10_000}
    assert config.cluster.colocate == ("policy,reference", "critic,reward")
    assert config.policy.adam_betas == (0.8, 0.9)
    assert config.data.prompt_format == "Question: {prompt}"
    assert config.train.max_tokens_per_micro_batch == 1000


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert ppo("--policy.lr", "1e-3", "--policy.lr", "1e-4").policy.lr == 1e-4


def test_a_boolean_flag_leaves_the_config_file_alone(file: Path) -> None:
    file.write_text("policy: {lr: 2e-6}\n")
    config = ppo("--checkpoint.resume", str(file))
    assert config.checkpoint.resume
    assert config.policy.lr == 2e-6


def test_a_flags_list_replaces_the_files(file: Path) -> None:
    file.write_text("cluster: {colocate: ['policy,critic']}\n")
    assert ppo(str(file), "--colocate", "all").cluster.colocate == ("all",)


@pytest.mark.parametrize(
    ("written", "rules"),
    [
        ("number", ("number",)),
        ("[number]", ("number",)),
        ("[number, format]", ("number", "format")),
        ("number, format", ("number", "format")),
        ('"[number, format]"', ("number", "format")),
        ("exact-match", ("exact-match",)),
    ],
)
def test_a_list_may_be_one_text_in_a_file_as_in_a_flag(file: Path, written: str, rules: tuple[str, ...]) -> None:
    file.write_text(f"reward: {{rules: {written}}}\n" if "," not in written else f"reward:\n  rules: {written}\n")
    argv = ["--data.path", "x.jsonl", "--policy.model", "m"]
    in_python = read_config("ppo", argv, {}, {"reward.rules": written.strip('"')}).config
    configs = [load_config("ppo", [str(file), *argv], {}), in_python]
    configs.append(load_config("ppo", [*argv, "--reward.rules", written.strip('"')], {}))
    for config in configs:
        assert isinstance(config, PpoConfig)
        assert tuple(source.type for source in config.reward.all_sources) == rules


def test_texts_in_a_list_stay_whole_as_in_a_flag(file: Path) -> None:
    file.write_text("policy: {lora: {rank: 8, targets: q_proj}}\ncluster: {colocate: 'policy,reference'}\n")
    config = ppo(str(file))
    assert (config.policy.lora.targets, config.cluster.colocate) == (("q_proj",), ("policy,reference",))


def test_a_text_in_place_of_sections_is_refused(file: Path) -> None:
    file.write_text("reward: {sources: number}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:1: reward.sources: must be a list \(got \"number\"\)"):
        load_config("ppo", [str(file), *RIGHT[:4]], {})


def test_reward_sources_in_a_file(file: Path) -> None:
    file.write_text(
        "reward:\n  sources:\n    - {type: function, function: 'a:b', weight: 2}\n    - {type: model, model: x}\n"
    )
    config = load_config("ppo", [str(file), *RIGHT[:4]], {})
    assert isinstance(config, PpoConfig)
    assert [source.type for source in config.reward.all_sources] == ["function", "model"]
    assert set(config.models) == {"policy", "reference", "critic", "reward", "reward.sources.1"}
    assert config.critic.model == "x"


def test_what_follows_from_other_values_is_filled_in() -> None:
    config = ppo()
    assert (config.reference.model, config.critic.model) == ("m", "m")
    scored = load_config("ppo", [*RIGHT[:4], "--reward.model", "r"], {})
    assert isinstance(scored, PpoConfig)
    assert (scored.reference.model, scored.critic.model) == ("m", "r")
    own = load_config("ppo", [*RIGHT, "--reference.model", "f", "--critic.model", "c"], {})
    assert isinstance(own, PpoConfig)
    assert (own.reference.model, own.critic.model) == ("f", "c")
    assert config.resolved() == config


@pytest.mark.parametrize(("command", "kind"), [("sft", SftConfig), ("rm", RmConfig), ("ppo", PpoConfig)])
def test_a_written_config_reads_back_as_itself(file: Path, command: str, kind: type[TrainConfig]) -> None:
    model = {"rm": "--reward.model"}.get(command, "--policy.model")
    reward = ("--reward.function", "a:b") if command == "ppo" else ()
    odd = (
        "--data.split",
        "1e5",
        "--data.label-key",
        "\x85",
        "--data.prompt-format",
        "${X} $${Y} 'a': {prompt}\n\n  # é\t",
    )
    config = load_config(command, ["--data.path", "x", model, "null.x", *reward, *odd], {})
    assert isinstance(config, kind)
    file.write_text(dump_config(config))
    assert load_config(command, [str(file)], {}) == config


def test_the_summary_says_what_differs() -> None:
    config = ppo("--algo.kl.type", "adaptive", "--policy.lr", "2e-6")
    assert short_summary(config).splitlines() == [
        "data: path=x.jsonl",
        "policy: model=m, lr=2e-06",
        "reference: model=m",
        "reward: function=rewards:score",
        "critic: model=m",
        "algo: kl.type=adaptive, kl.target=6.0, kl.horizon=10000",
    ]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ppo().policy.lr = 1.0  # type: ignore[misc]


def test_an_unknown_command_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        load_config("pppo", [], {})


def test_options_of_generate() -> None:
    config = load_generate(["m", "--prompt", "1e-6", "--prompt", "b: c", "--max-tokens", "7", "--temperature", "0"])
    assert (config.model, config.prompt, config.max_tokens, config.temperature) == ("m", ("1e-6", "b: c"), 7, 0.0)
    with pytest.raises(ConfigError) as raised:
        load_generate(["--max-tokns", "3", "--prompt", "a", "--prompts", "f"])
    assert raised.value.problems == (
        "--max-tokns: unknown key. Did you mean --max-tokens?",
        "--prompts: --prompt is given too. Use one of them.",
    )
    with pytest.raises(ConfigError, match="name a model"):
        load_generate([])
    with pytest.raises(ConfigError, match="give --prompt TEXT, or --prompts FILE"):
        load_generate(["m"])
