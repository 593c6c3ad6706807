"""Bad input, row by row: the line that the user gets."""

# ruff: noqa: E501

import pytest

from tests.unit.config.conftest import Problems

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")

IN_FILE = [
    ("policy:\n  lr: 1.0\n  lrr: 1e-6\n", "config.yaml:3: policy.lrr: unknown key. Did you mean policy.lr?"),
    ("actor: {lr: 1e-6}\n", "config.yaml:1: actor.lr: unknown key. Did you mean policy.lr?"),
    ('policy: {lr: "1e-6x"}\n', 'config.yaml:1: policy.lr: not a number (got "1e-6x").'),
    ("policy: {lr: -1e-6}\n", "config.yaml:1: policy.lr: must be > 0 (got -1e-06)."),
    ("policy: {lr: 0}\n", "config.yaml:1: policy.lr: must be > 0 (got 0)."),
    ("policy: {lr: .nan}\n", "config.yaml:1: policy.lr: must be finite and > 0 (got nan)."),
    ("policy: {lr: nan}\n", "config.yaml:1: policy.lr: must be finite and > 0 (got nan)."),
    ("policy: {lr: .inf}\n", "config.yaml:1: policy.lr: must be finite and > 0 (got inf)."),
    ("policy: {lr: true}\n", "config.yaml:1: policy.lr: must be a number (got true)."),
    ("train: {batch_size: 6.5}\n", "config.yaml:1: train.batch_size: must be a whole number (got 6.5)."),
    ("algo: {kl: {coef: -0.1}}\n", "config.yaml:1: algo.kl.coef: must be >= 0 (got -0.1)."),
    ("algo: {gamma: 1.2}\n", "config.yaml:1: algo.gamma: must be in [0, 1] (got 1.2)."),
    ("algo: {gae_lambda: -0.1}\n", "config.yaml:1: algo.gae_lambda: must be in [0, 1] (got -0.1)."),
    (
        "algo: {loss: clipp}\n",
        'config.yaml:1: algo.loss: must be one of clip, penalty (got "clipp"). Did you mean clip?',
    ),
    (
        "run: {seed: 1180591620717411303424}\n",
        "config.yaml:1: run.seed: must be in [0, 2^63) (got 1180591620717411303424).",
    ),
    ("run: {seed: abc}\n", 'config.yaml:1: run.seed: must be a whole number (got "abc").'),
    (
        "run: {name: ../x}\n",
        'config.yaml:1: run.name: only letters, digits, . _ -, and a letter or digit first (got "../x").',
    ),
    ("run: {name: 12}\n", "config.yaml:1: run.name: must be text (got 12)."),
    ("checkpoint: {every_steps: 0}\n", "config.yaml:1: checkpoint.every_steps: must be > 0 (got 0)."),
    ("policy:\n  lr: 1\n\n  lr: 2\n", 'config.yaml:4: key "policy.lr" given twice (first at line 2).'),
    ("- a\n", "config.yaml: not a mapping (got list)."),
    ("", "config.yaml: not a mapping (got nothing)."),
    ("# only a comment\n", "config.yaml: not a mapping (got nothing)."),
    (b"a: \x00\x01", "config.yaml: not a text file."),
    (b"a: \xff\xfe", "config.yaml: not a text file (not UTF-8 at byte 3)."),
    ("#" * (1024 * 1024 + 1), "config.yaml: larger than 1 MiB."),
    ("policy:\n\tlr: 1\n", "config.yaml:2:1: not valid YAML: found a tab; indent with spaces."),
    (
        "policy:\n  lr: 1\n dtype: auto\n",
        "config.yaml:3:2: not valid YAML: bad indentation; the keys of a section must line up.",
    ),
    ("policy: [1,\n", "config.yaml:2:1: not valid YAML: a bracket or quote is not closed."),
    ("a: 1\n---\nb: 2\n", "config.yaml:2:1: not valid YAML: more than one document."),
    ("a: &x 1\nb: *x\n", "config.yaml:1:4: not valid YAML: anchors and aliases are not read; write the value out."),
    (
        "a: !!python/object:os.system {}\n",
        "config.yaml:1:4: not valid YAML: tags are not read (got tag:yaml.org,2002:python/object:os.system).",
    ),
    ("a: " + "[" * 5000, "config.yaml:1:44: not valid YAML: nested deeper than 40."),
    ("policy: 3\n", "config.yaml:1: policy: must be a mapping (got 3). Set its fields, as policy.model."),
    (
        "data: {eval_path: '${EVAL_DIR}/x'}\n",
        "config.yaml:1: data.eval_path: environment variable EVAL_DIR is not set.",
    ),
    ("wandb: {api_key: abc}\n", "config.yaml:1: wandb.api_key: secrets may not be in config; export WANDB_API_KEY."),
    (
        "algo: {kl: {target: 3}}\n",
        "config.yaml:1: algo.kl.target: only with type adaptive. Set algo.kl.type adaptive, or remove it.",
    ),
    ("algo: {kl: {type: adaptve}}\n", 'config.yaml:1: algo.kl: type must be one of fixed, adaptive (got "adaptve").'),
    ("rollot: {}\n", "config.yaml:1: rollot: unknown key. Did you mean rollout?"),
]


@pytest.mark.parametrize(("text", "line"), IN_FILE, ids=lambda value: str(value)[:50].replace("\n", " "))
def test_a_wrong_file_gets_its_line(problems: Problems, text: str | bytes, line: str) -> None:
    found = problems(*RIGHT, text=text)
    assert found == [line]


def test_what_a_broken_file_would_have_set_is_not_missed(problems: Problems) -> None:
    assert problems(text="policy: [1,\n") == [
        "config.yaml:2:1: not valid YAML: a bracket or quote is not closed.",
    ]


def test_a_key_of_another_type_says_which_type_has_it(problems: Problems) -> None:
    """Also where that type stands within a section that has types itself."""
    given = ("--data.path", "x.jsonl", "--policy.model", "m")
    (line,) = problems(*given, "--reward.function", "a:b", "--algo.kl.target", "3", command="grpo")
    assert line == "--algo.kl.target: only with type adaptive. Set algo.kl.type adaptive, or remove it."
    (line,) = problems(*given, "--loss", "simpo", "--algo.loss.label-noise", "0.1", command="dpo")
    assert line.startswith("--algo.loss.label-noise: only with type cdpo or rdpo.")


def test_a_wrong_value_is_told_once(problems: Problems) -> None:
    """Also where the type that is asked for cannot do without it."""
    custom = ("--algo", "custom", "--algo.algorithm", "best_of_group.BestOfGroup")
    found = problems(*RIGHT, *custom, command="grpo")
    assert found[0] == ('--algo.algorithm: need module:name or file.py:name (got "best_of_group.BestOfGroup").')
    assert len(found) == len(set(found)) <= 2


@pytest.mark.parametrize(
    ("command", "text", "line"),
    [
        (
            "grpo",
            "critic:\n  model: m\n  lr: 1e-6\n",
            "config.yaml:2: critic.model: grpo has no critic. Leave it out, or run ppo.",
        ),
        (
            "sft",
            "rollout: {batch_size: 4}\n",
            "config.yaml:1: rollout.batch_size: sft has no rollout. Leave it out, or run ppo or grpo or online-dpo or online-kto.",
        ),
    ],
)
def test_a_section_of_another_command_is_named_once(problems: Problems, command: str, text: str, line: str) -> None:
    found = problems("--data.path", "x.jsonl", "--policy.model", "m", text=text, command=command)
    assert [one for one in found if "config.yaml" in one] == [line]


ON_LINE = [
    (["--policy.lrr", "1"], "--policy.lrr: unknown key. Did you mean --policy.lr?"),
    (["--polcy.lr=1"], "--polcy.lr: unknown key. Did you mean --policy.lr?"),
    (["--run.sead", "1"], "--run.sead: unknown key. Did you mean --run.seed?"),
    (["--resum"], "--resum: unknown key. Did you mean --checkpoint.resume?"),
    (["--policy.lr"], "--policy.lr: needs a value."),
    (["--policy.lr", "--resume"], "--policy.lr: needs a value."),
    (["--set", "policy.lr"], '--set: need key=value (got "policy.lr").'),
    (["--set"], '--set: need key=value (got "").'),
    (["--wandb.api-key", "abc"], "--wandb.api-key: secrets may not be in config; export WANDB_API_KEY."),
    (["--reward.function", "score"], '--reward.function: need module:name or file.py:name (got "score").'),
    (["--log.mlflow-uri", "https://me:secret@host"], "--log.mlflow-uri: no credentials in the address; export MLFLOW_TRACKING_USERNAME and _PASSWORD."),
    (["--rollout.group-size", "0"], "--rollout.group-size: must be > 0 (got 0)."),
    (["--rollout.top-k", "[1"], "--rollout.top-k: not valid YAML: a bracket or quote is not closed."),
    (["--policy.adam-betas", "0.9"], "--policy.adam-betas: too few values (got [0.9])."),
    (["--reward.rules", "maths"], '--reward.rules.0: must be one of exact-match, choice, number, math, format, length or overlong (got "maths"). Did you mean math?'),
    (["--policy.adam-betas", "0.9,1.0"], "--policy.adam-betas: both must be in [0, 1) (got [0.9, 1.0])."),
    (["--policy", "x"], '--policy: must be a mapping (got "x"). Set its fields, as --policy.model.'),
    (["a.yaml", "b.yaml"], 'b.yaml: unexpected argument. Flags start with "--"; one file that ends in .yaml may come before them.'),
    (["prompts.jsonl"], "prompts.jsonl: unexpected argument. Write --data.path prompts.jsonl."),
    (["policy.lr=1e-6"], "policy.lr=1e-6: unexpected argument. Write --policy.lr 1e-6."),
    (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory."),
    (["--colocate", "policy,refrence"], '--cluster.colocate: unknown role "refrence" (have policy, reference, critic, reward, rollout, or all).'),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "line"), ON_LINE, ids=lambda value: str(value)[:50])
def test_a_wrong_flag_gets_its_line(problems: Problems, argv: list[str], line: str) -> None:
    assert line in problems(*RIGHT, *argv)


BETWEEN = [
    (
        ["--rollout.batch-size", "32", "--rollout.group-size", "2", "--train.batch-size", "128"],
        "--train.batch-size: 128 > rollout.batch_size*group_size = 64: no step could ever run. Lower it to 64.",
    ),
    (
        ["--rollout.batch-size", "120", "--train.batch-size", "16"],
        "--train.batch-size: 16 does not divide rollout.batch_size*group_size = 120. Nearest: 15 or 20.",
    ),
    (
        ["--rollout.temperature", "0.005"],
        "--rollout.temperature: vLLM samples at 0.01 for any lower temperature, and ratios would compare two "
        "policies; needs >= 0.01 (got 0.005).",
    ),
    (
        ["--rollout.group-size", "8", "--rollout.temperature", "0"],
        "--rollout.temperature: 0 is greedy and makes all 8 responses to a prompt equal: PPO learns from sampled responses, "
        "and needs > 0 (got 0).",
    ),
    (["--algo.ptx-coef", "0.1"], "algo.ptx_path: missing; algo.ptx_coef 0.1 needs rows of text."),
    (["--algo.ptx-path", "x"], "algo.ptx_coef: 0, so algo.ptx_path has no effect. Set it above 0, or remove the path."),
    (
        ["--reward.url", "https://a/b"],
        "reward: function and url are both given; set one, or list them all under sources.",
    ),
    (
        ["--train.num-steps", "3", "--algo.critic-warmup-steps", "3"],
        "--algo.critic-warmup-steps: 3 of 3 steps: the policy would never learn. Lower it, or raise train.num_steps.",
    ),
    (
        ["--colocate", "policy,reference", "--policy.num-gpus-per-node", "2"],
        "reference.num_gpus_per_node: 1, but policy, which shares its devices, has 2. Set both to the same number.",
    ),
    (["--colocate", "policy,critic", "--colocate", "critic,reward"], "--cluster.colocate: critic is named 2 times. Name each role once."),
    (["--colocate", "all", "--colocate", "critic,reward"], "--cluster.colocate: critic is named 2 times. Name each role once."),
    (["--colocate", "policy"], '--cluster.colocate: needs two roles or more (got "policy"), as policy,reference.'),
    (
        ["--colocate", "all", "--rollout.num-engines", "3"],
        "--rollout.num-engines: 3 engines of 1 GPUs do not fit on the 1 x 1 devices that policy shares with them. "
        "Set it to at most 1, or raise policy.num_gpus_per_node.",
    ),
    (
        ["--colocate", "policy,rollout", "--policy.num-nodes", "2", "--policy.num-gpus-per-node", "8", "--rollout.tensor-parallel-size", "16"],
        "--rollout.tensor-parallel-size: an engine needs 16 GPUs on one node, and policy, which shares its devices, has 8 on each. "
        "Give an engine at most 8 (tensor_parallel_size * pipeline_parallel_size), or raise rollout.num_nodes_per_engine.",
    ),
    (
        ["--colocate", "policy,rollout", "--policy.num-nodes", "2", "--policy.num-gpus-per-node", "3", "--rollout.num-engines", "3", "--rollout.tensor-parallel-size", "2"],
        "--rollout.num-engines: 3 engines of 2 GPUs do not fit on the 2 x 3 devices that policy shares with them. "
        "Set it to at most 2, or raise policy.num_gpus_per_node.",
    ),
    (
        ["--colocate", "all", "--rollout.max-lag", "1"],
        "--rollout.max-lag: 1 lets rollouts run while the policy trains, but --colocate all puts both on the same "
        "devices, which would do both at once. Set it to 0, or give rollout its own devices.",
    ),
    (["--rollout.kv-cache", "keep"], "--rollout.kv-cache: keep has no effect: no response goes on over a weight sync. Set rollout.max_lag above 0, partial keep."),
    (["--rollout.kv-cache", "keep", "--rollout.max-lag", "1", "--rollout.partial", "abort"], "--rollout.kv-cache: keep has no effect: no response goes on over a weight sync. Set rollout.max_lag above 0, partial keep."),
    (["--rollout.kv-cache", "keep", "--rollout.max-lag", "1", "--rollout.engine", "transformers"], "--rollout.kv-cache: the transformers engine ends its batch before it takes new weights. Set recompute, or use vllm."),
    (["--rollout.oversample", "1.25"], "--rollout.oversample: 1.25 samples more groups than a step needs, and order fifo takes all in their order. Use order ready."),
    (["--rollout.oversample", "1.25", "--rollout.order", "ready", "--colocate", "all"], "--rollout.oversample: engines that share devices sleep while models train, and cannot with responses in progress. Set it to 1, or give rollout its own devices."),
    (["--rollout.sync-backend", "ipc"], "--rollout.sync-backend: ipc needs policy and rollout on the same GPUs. Add --colocate policy,rollout."),
    (["--rollout.sync-backend", "gloo", "--cluster.device", "cuda"], "--rollout.sync-backend: gloo sends from CPUs and cluster.device is cuda. Use nccl, ipc (where they share GPUs) or auto."),
    (["--rollout.sync-backend", "nccl", "--cluster.device", "cpu"], "--rollout.sync-backend: nccl needs GPUs and cluster.device is cpu. Use gloo or auto."),
    (["--colocate", "all", "--rollout.sync-backend", "nccl"], "--rollout.sync-backend: nccl cannot send within one GPU; policy and rollout share theirs. Use ipc or auto."),
    (["--rollout.engine", "transformers", "--rollout.tensor-parallel-size", "2"], "--rollout.tensor-parallel-size: the transformers engine runs on one device (got 2). Use engine vllm."),
    (["--policy.offload-parameters", "--policy.zero-stage", "2"], "--policy.offload-parameters: needs ZeRO stage 3 (got policy.zero_stage 2)."),
    (["--policy.swap-optimizer", "--policy.zero-stage", "2"], "--policy.swap-optimizer: needs ZeRO stage 3 (got policy.zero_stage 2)."),
    (["--policy.swap-optimizer", "--policy.offload-optimizer"], "--policy.swap-optimizer: offload_optimizer steps in host memory. Use one of them."),
    (["--policy.offload-optimizer", "--policy.zero-stage", "0"], "--policy.offload-optimizer: needs ZeRO stage 1 or higher (got policy.zero_stage 0)."),
    (["--policy.trust-remote-code", "a/b"], '--policy.trust-remote-code: need repo@commit with all 40 digits of the commit (got "a/b").'),
    (["--policy.attention", "flash_attention_2", "--policy.dtype", "float32"], "--policy.attention: flash_attention_2 cannot compute in float32. Use sdpa, or dtype bfloat16."),
    (["--policy.attention", "flash_attention_2", "--cluster.device", "cpu"], "--policy.attention: flash_attention_2 needs a GPU. Use sdpa or auto."),
    (["--eval.every-steps", "5"], "--eval.every-steps: there are no held-out rows. Set data.eval_path or data.eval_fraction."),
    (["--data.eval-path", "x", "--data.eval-fraction", "0.1"], "--data.eval-fraction: 0.1 is not used together with data.eval_path. Give one of them."),
    (["--data.ranking-key", "r", "--data.chosen-key", "c"], "--data.ranking-key: a ranking already says which responses are better. Give it, or chosen_key and rejected_key."),
    (["--data.response-key", "r"], "--data.response-key: not read by ppo. Remove it."),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "line"), BETWEEN, ids=lambda value: str(value)[:60])
def test_values_that_do_not_go_together_get_a_line(problems: Problems, argv: list[str], line: str) -> None:
    assert line in problems(*RIGHT, *argv)


def test_the_right_command_line_has_no_problem(problems: Problems) -> None:
    assert problems(*RIGHT) == []


def test_a_run_without_anything_names_what_it_needs(problems: Problems) -> None:
    assert problems() == [
        "data.path: missing; name a file, a folder or a hub data set.",
        "policy.model: missing; name the model to train, a folder or a hub name.",
        "reward: none given; set one of reward.model, reward.function, reward.url, reward.rules, reward.sources.",
    ]
    assert problems(command="rm")[1] == "reward.model: missing; name the model to train, a folder or a hub name."


def test_colocation_is_checked_for_every_command(problems: Problems) -> None:
    found = problems("--data.path", "x", "--policy.model", "m", "--colocate", "policy,critc", command="sft")
    assert found == [
        '--cluster.colocate: unknown role "critc" (have policy, reference, critic, reward, rollout, or all).'
    ]


SOURCES = [
    ("[{type: http, url: 'ftp://x'}]", '--reward.sources.0.url: scheme must be http or https (got "ftp").'),
    ("[{type: function, function: 'a:b'}, {type: function, function: 'a:c'}]",
     '--reward.sources: 2 sources are called "function". Give each source its own name.'),
    ("[{type: model}]", "--reward.sources.0.model: missing; name a folder or a hub name."),
    ("[{type: model, model: m, num_nodes: 0}]", "--reward.sources.0.num-nodes: must be > 0 (got 0)."),
    ("[{type: function, fnction: 'a:b'}]", "--reward.sources.0.fnction: unknown key. Did you mean function?"),
    ("[{type: function}]", "--reward.sources.0.function: missing."),
    (
        "[{type: magic}]",
        "--reward.sources.0: type must be one of model, prm, function, http, judge, math, code, exact-match, choice, "
        'number, format, length, overlong, regex, environment (got "magic").',
    ),
    ("[{}]", "--reward.sources.0: type is missing."),
    ("3", "--reward.sources.0: must be a mapping (got 3)."),
]  # fmt: skip


@pytest.mark.parametrize(("sources", "line"), SOURCES, ids=lambda value: str(value)[:50])
def test_a_wrong_source_gets_its_line(problems: Problems, sources: str, line: str) -> None:
    assert line in problems("--data.path", "x", "--policy.model", "m", "--reward.sources", sources)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://x", 'scheme must be http or https (got "ftp").'),
        ("localhost:5000/get", 'scheme must be http or https (got "localhost").'),
        ("http://169.254.169.254/", "link-local address refused."),
        ("http://8.8.8.8/", "plain http to a non-private host; use https, or a source with allow_plain_http."),
        ("https://user:pass@host/", "no credentials in the address; name an environment variable by auth_env."),
    ],
)
def test_an_unsafe_reward_address_is_refused(problems: Problems, url: str, said: str) -> None:
    (found,) = problems("--data.path", "x", "--policy.model", "m", "--reward.url", url)
    assert found == f"--reward.url: {said}"


def test_all_problems_come_at_once_each_with_its_place(problems: Problems) -> None:
    found = problems(
        "--policy.lrr",
        "3",
        "--rollout.group-size",
        "0",
        text="policy: {lr: x}\nrun: {seed: -1}\n",
        environ={"RLHF__ALGO__GAMMA": "2", "RLHF__POLICY__LRR": "1", "OTHER__X": "1"},
    )
    assert [line.split(": ")[0] for line in found] == [
        "RLHF__POLICY__LRR",
        "--policy.lrr",
        "config.yaml:2",
        "config.yaml:1",
        "--rollout.group-size",
        "RLHF__ALGO__GAMMA",
        "data.path",
        "policy.model",
        "reward",
    ]


def test_a_rule_stays_silent_where_a_value_of_its_is_wrong(problems: Problems) -> None:
    """The default in place of a wrong value must not be complained about."""
    found = problems(*RIGHT, "--rollout.batch-size", "x", "--train.batch-size", "999")
    assert found == ['--rollout.batch-size: must be a whole number (got "x").']


def test_a_long_value_is_cut(problems: Problems) -> None:
    (found,) = problems(*RIGHT, "--policy.lr", "x" * 5000)
    assert len(found) < 150
