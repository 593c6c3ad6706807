"""A launch command in OpenRLHF's flags is accepted as it stands."""

import shlex

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.algo import DpoSection, GrpoSection, PpoSection, TruncatedWeights
from rlhf.config.commands import DpoConfig, GrpoConfig, PpoConfig
from rlhf.config.loading.load import load_config
from rlhf.config.loading.openrlhf import translate
from rlhf.config.models import TrainedModelSection
from rlhf.planning.roles import place
from tests.unit.config.conftest import Problems

LAUNCH = shlex.split(
    "--ref_num_nodes 1 --ref_num_gpus_per_node 4 --reward_num_nodes 1 --reward_num_gpus_per_node 4 "
    "--critic_num_nodes 1 --critic_num_gpus_per_node 4 --actor_num_nodes 1 --actor_num_gpus_per_node 4 "
    "--vllm_num_engines 4 --vllm_tensor_parallel_size 2 --colocate_actor_ref --colocate_critic_reward "
    "--ref_reward_offload --pretrain org/policy --reward_pretrain org/reward --save_path out "
    "--micro_train_batch_size 8 --train_batch_size 128 --rollout_batch_size 1024 --max_epochs 1 "
    "--prompt_max_len 1024 --generate_max_len 512 --zero_stage 3 --bf16 --actor_learning_rate 5e-7 "
    "--critic_learning_rate 9e-6 --init_kl_coef 0.01 --prompt_data org/prompts --input_key question "
    "--apply_chat_template --normalize_reward --adam_offload --flash_attn --gradient_checkpointing --packing_samples"
)


def test_a_familiar_launch_is_read_as_it_stands() -> None:
    config = load_config("ppo", LAUNCH, {})
    assert isinstance(config, PpoConfig)
    models = [config.policy, config.reference, config.critic, config.reward]
    assert [model.num_ranks for model in models] == [4] * 4
    assert {model.dtype for model in models} == {"bfloat16"}
    assert {model.attention for model in models} == {"flash_attention_2"}
    assert [model.model for model in models] == ["org/policy", "org/policy", "org/reward", "org/reward"]
    assert [model.offload_parameters for model in models] == [False, True, False, True]
    assert [model.offload_optimizer for model in (config.policy, config.critic)] == [True, True]
    assert [model.gradient_checkpointing for model in (config.policy, config.critic)] == [True, True]
    assert (config.policy.zero_stage, config.policy.lr, config.critic.lr) == (3, 5e-7, 9e-6)
    assert (config.rollout.num_engines, config.rollout.tensor_parallel_size) == (4, 2)
    assert (config.rollout.batch_size, config.train.batch_size, config.train.micro_batch_size) == (1024, 128, 8)
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (1024, 512)
    assert config.cluster.colocate == ("policy,reference", "critic,reward")
    assert (config.data.path, config.data.prompt_key, config.data.template) == ("org/prompts", "question", "chat")
    assert isinstance(config.algo, PpoSection)
    assert config.algo.kl.coef == 0.01
    assert config.algo.normalize_rewards
    assert config.run.dir == "out"


@pytest.mark.parametrize(
    ("left_out", "num_devices"), [(set(), 16), ({"--colocate_actor_ref", "--colocate_critic_reward"}, 24)]
)
def test_the_launch_takes_16_gpus_and_without_its_merges_24(left_out: set[str], num_devices: int) -> None:
    config = load_config("ppo", [word for word in LAUNCH if word not in left_out], {})
    assert place(config, build_algorithm(config.algo).needs).num_devices == num_devices


def test_keys_that_the_command_lacks_are_left_out() -> None:
    known = {"policy.dtype", "reference.dtype"}
    own = ["--policy.dtype", "bfloat16", "--reference.dtype", "bfloat16"]
    translation = translate(["--bf16", "--actor_num_nodes", "2"], known)
    assert translation.argv == own
    assert translation.problems == ["--actor_num_nodes: this command has no such setting. Leave it out."]


def test_spellings() -> None:
    known = {"data.prompt_format", "run.seed", "policy.model"}
    own = ["--data.prompt-format", "Q: {prompt} A:", "--run.seed", "3", "x.yaml", "--policy.model", "m"]
    theirs = ["--input_template=Q: {} A:", "--seed", "3", "x.yaml", "--policy.model", "m"]
    assert translate(theirs, known).argv == own
    assert translate(["--num-episodes=2"], {"train.num_epochs"}).argv == ["--train.num-epochs", "2"]


def test_a_reward_model_learns_by_the_same_flags() -> None:
    theirs = shlex.split(
        "--pretrain org/m --dataset org/pairs --chosen_key good --rejected_key bad --max_len 2048 --learning_rate 9e-6 "
        "--max_epochs 2 --zero_stage 2 --gradient_checkpointing --adam_offload --save_steps -1 --eval_steps=-1 "
        "--logging_steps 1 --ckpt_path elsewhere --packing_samples"
    )
    config = load_config("rm", theirs, {})
    reward = config.models["reward"]
    assert isinstance(reward, TrainedModelSection)
    assert (reward.model, reward.lr, reward.zero_stage) == ("org/m", 9e-6, 2)
    assert (reward.gradient_checkpointing, reward.offload_optimizer) == (True, True)
    data = config.data
    assert (data.path, data.chosen_key, data.rejected_key, data.max_tokens) == ("org/pairs", "good", "bad", 2048)
    assert config.train.num_epochs == 2
    assert config.checkpoint == load_config("rm", theirs[:4], {}).checkpoint


def test_a_preference_run_and_a_hybrid_one() -> None:
    dpo = load_config("dpo", shlex.split("--pretrain m --dataset d --beta 0.3 --learning_rate 1e-7 --ref_offload"), {})
    assert isinstance(dpo, DpoConfig)
    assert isinstance(dpo.algo, DpoSection)
    assert (dpo.algo.loss.beta, dpo.policy.lr, dpo.reference.offload_parameters) == (0.3, 1e-7, True)
    hybrid = shlex.split(
        "--pretrain m --reward_pretrain r --prompt_data d --vllm_num_engines 1 --colocate_all_models "
        "--vllm_enable_sleep --deepspeed_enable_sleep --vllm_sync_backend nccl --use_kl_loss --kl_estimator k3"
    )
    config = load_config("ppo", hybrid, {})
    assert isinstance(config, PpoConfig)
    assert config.rollout.sync_backend == "auto"
    assert isinstance(config.algo, PpoSection)
    assert (config.algo.kl_placement, config.algo.kl_estimator) == ("loss", "k3")


GRPO_LAUNCH = shlex.split(
    "--ref_num_nodes 1 --ref_num_gpus_per_node 8 --actor_num_nodes 1 --actor_num_gpus_per_node 8 "
    "--reward_num_gpus_per_node 8 --critic_num_gpus_per_node 8 --critic_learning_rate 9e-6 --freezing_actor_steps -1 "
    "--vllm_num_engines 4 --vllm_tensor_parallel_size 2 --colocate_all_models --vllm_gpu_memory_utilization 0.6 "
    "--init_kl_coef 1e-3 --gamma 1.0 --kl_estimator k3 --advantage_estimator group_norm --dynamic_filtering "
    "--dynamic_filtering_reward_range 0 1 --eps_clip_low_high 0.2 0.3 --pretrain m --reward_pretrain r "
    "--save_path out --micro_train_batch_size 8 --train_batch_size 128 --rollout_batch_size 128 "
    "--n_samples_per_prompt 8 --max_samples 20000 --prompt_data org/prompts --adam_betas 0.9 0.95 --lora_dropout 0 "
    "--enable_vllm_is_correction --vllm_is_truncated_threshold 0.5 5.0 --use_dynamic_batch --use_tensorboard logs"
)


def test_a_launch_without_a_critic() -> None:
    config = load_config("grpo", GRPO_LAUNCH, {})
    assert isinstance(config, GrpoConfig)
    algo = config.algo
    assert isinstance(algo, GrpoSection)
    assert (algo.type, algo.kl.coef, algo.kl_placement, algo.kl_estimator) == ("grpo", 1e-3, "reward", "k3")
    assert (algo.clip_low, algo.clip_high, algo.dynamic_sampling) == (0.2, 0.3, True)
    assert isinstance(algo.correction, TruncatedWeights)
    assert algo.correction.cap == 5.0
    assert (config.policy.adam_betas, config.train.micro_batch_size) == ((0.9, 0.95), None)
    assert config.data.split == "train[:20000]"


def test_a_penalty_in_the_loss() -> None:
    config = load_config("grpo", [*GRPO_LAUNCH, "--use_kl_loss"], {})
    assert isinstance(config, GrpoConfig)
    assert isinstance(config.algo, GrpoSection)
    assert (config.algo.kl.coef, config.algo.kl_placement) == (1e-3, "loss")


def test_a_key_for_a_tracker_is_never_shown() -> None:
    theirs = ["--use_wandb", "0123456789", "--wandb_org", "us", "--wandb_run_name", "x"]
    translation = translate(theirs, {"log.wandb_project"})
    assert (translation.problems, translation.argv) == ([], [])
    assert not [line for line in translation.lines if "0123456789" in line]


def test_messages_name_other_flags_without_dots() -> None:
    assert translate(["--max_samples", "5", "--prompt_split", "x"], {"data.split"}).lines == [
        "--prompt_split sets nothing (read with --max_samples)"
    ]
    assert translate(["--kl_horizon", "5"], set()).lines == ["--kl_horizon sets nothing (acts only with --kl_target)"]


def test_of_both_names_of_a_flag_the_last_one_counts() -> None:
    known = {"policy.lr"}
    assert translate(["--actor_learning_rate", "1", "--actor.adam.lr", "2"], known).argv == ["--policy.lr", "2"]
    assert translate(["--actor.adam.lr", "2", "--actor_learning_rate", "1"], known).argv == ["--policy.lr", "1"]


def test_what_each_flag_became_is_told() -> None:
    argv = ["--ckpt_path", "x", "--seed", "3", "--vllm-enable-sleep", "--packing_samples", "--save_steps", "-1"]
    assert translate(argv, {"run.seed", "checkpoint.every_steps"}).lines == [
        "--ckpt_path sets nothing (checkpoints are in the run's folder)",
        "--seed 3 became --run.seed 3",
        "--vllm-enable-sleep sets nothing (engines that share devices always sleep)",
        "--packing_samples sets nothing (always so)",
        "--save_steps sets nothing (-1 asks for nothing)",
    ]


def test_what_is_theirs_and_has_no_counterpart_is_refused(problems: Problems) -> None:
    assert any("--use-ray-magic" in line for line in problems(*LAUNCH, "--use_ray_magic", "1"))
    assert problems(*LAUNCH, "--seed") == ["--seed: needs a value."]
    assert problems(*LAUNCH, "--bf16=false") == ["--bf16: takes no value (got false). Leave it out if it is not meant."]
    assert problems(*LAUNCH, "--kl_estimator", "--seed", "3") == ["--kl_estimator: needs a value."]
