.PHONY: setup quickstart check lint types unit test integration torture damage conversations chaos soak bench lock wheel docs image-cpu \
	image-gpu models model-runs contracts gpu-day dry-70b release-notes clean bench-learning bench-lag bench-preferences bench-addition \
	bench-agents bench-planning bench-stream bench-trl same

BIN := .venv/bin
# Many tests wait for a deadline or for another process: one worker more than there are cores keeps these busy.
TEST_WORKERS = $$(($$(getconf _NPROCESSORS_ONLN) + 1))

# Every process of a run imports 3,000 modules. Where Python may not keep them compiled, each process compiles them anew:
# a third of the time that imports take.
unexport PYTHONDONTWRITEBYTECODE

setup: .venv/.ready

.venv/.ready: requirements/cpu.lock pyproject.toml scripts/setup.sh
	bash scripts/setup.sh

quickstart: .venv/.ready  ## SFT, reward model and PPO on a tiny model, with a table of what it learned
	$(BIN)/rlhf quickstart

check: .venv/.ready  ## ruff, mypy --strict and the unit tests, in parallel: five minutes on two cores
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types unit

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

unit: .venv/.ready
	$(BIN)/pytest -q -n $(TEST_WORKERS) --dist loadfile tests/unit

integration: .venv/.ready
	$(BIN)/pytest -q -n $(TEST_WORKERS) --dist loadfile --durations=25 tests/integration

test: check integration  ## linters, types and all tests, with the real Ray, vLLM and DeepSpeed: twenty minutes

torture: .venv/.ready  ## 200 kills and full disks during saving, 12,000 configs and 36,000 data files: ten minutes
	RLHF_TEST_TORTURES=200 RLHF_TEST_EXAMPLES=4000 $(BIN)/pytest -q -o timeout=3600 \
		tests/unit/orchestrator/run/test_checkpoint.py tests/unit/config/loading/test_fuzz.py tests/unit/orchestrator/data/test_fuzz.py

damage: .venv/.ready  ## 50 damages of each file of a model, a table and a config through check, plan and data
	RLHF_TEST_FILES=50 $(BIN)/pytest -q tests/unit/launch/test_fuzz_files.py

conversations: .venv/.ready  ## 10,000 conversations through every chat template that installed libraries ship, and 1,000 episodes of ten families: 45 minutes of one core
	RLHF_TEST_CONVERSATIONS=10000 RLHF_TEST_EPISODES=1000 $(BIN)/pytest -q -n auto -o timeout=3600 \
		tests/unit/conversations/test_generated.py tests/unit/environments/test_exact_tokens.py

runs/stories/sft/model: .venv/.ready
	$(BIN)/rlhf example stories

chaos: runs/stories/sft/model  ## PPO with every kind of process killed in every phase, 48 faults for each of three seeds: three hours
	for seed in 0 1 2; do $(BIN)/rlhf chaos ppo configs/ppo_stories_cpu.yaml --train.num-steps 60 \
		--run.name chaos-$$seed --chaos-seed $$seed --num-faults 48 --kinds kill,tear || exit 1; done

soak: runs/stories/sft/model  ## leaks in 1,000 steps of PPO, without faults and with a process killed every 30 s: an hour
	$(BIN)/python -m benchmarks.soak

bench: .venv/.ready  ## benchmarks of memory, weight sync and time per step; each prints a table
	$(BIN)/python -m benchmarks.run

bench-learning: .venv/.ready  ## does each online method learn, with the real Ray, vLLM and DeepSpeed: half an hour
	$(BIN)/python -m benchmarks.learning

bench-stream: .venv/.ready  ## how busy 64 rollout engines are, in virtual time: four minutes
	$(BIN)/python -m benchmarks.stream

bench-lag: .venv/.ready  ## off-policy GRPO (rollout.max_lag), with truncated importance sampling and without
	$(BIN)/python -m benchmarks.learning --lag

bench-preferences: .venv/.ready  ## each preference loss and KTO on pairs, and DPO on real dialogues: an hour
	$(BIN)/python -m benchmarks.preferences
	$(BIN)/python -m benchmarks.preferences --hh

bench-addition: .venv/.ready  ## a small model learns addition with SFT, then GRPO: ten minutes
	$(BIN)/python -m benchmarks.addition

bench-agents: .venv/.ready  ## small models learn to call a calculator, by several methods and clients, and to play a game: 12 minutes
	$(BIN)/python -m benchmarks.agents

bench-planning: .venv/.ready  ## `rlhf plan` for three model sizes on CPU, compared with measurements: eight minutes
	$(BIN)/python -m benchmarks.planning

bench-trl: .venv/.ready  ## compared with TRL: two hours
	$(BIN)/python -m benchmarks.beside_trl

models: .venv/.ready  ## write docs/models.md: a tiny model of every type in the installed transformers; ten minutes
	$(BIN)/python -m tests.models_page docs/models.md

model-runs: .venv/.ready  ## real runs of some families for docs/models.md, which `make models` writes; half an hour
	RLHF_TEST_MODELS=1 RLHF_TEST_MODELS_OUT=tests $(BIN)/pytest -q \
	  tests/integration/test_family_runs.py

dry-70b: .venv/.ready  ## a 70B model on 64 GPUs, tried on this machine: placement, start, export, save, resume in time and memory
	$(BIN)/python -m benchmarks.seventy

gpu-day:  ## on a machine with GPUs: what runs there, how fast and in which memory; writes docs/gpu.md. DRY=1: on a CPU
	$(PYTHON) -m benchmarks.gpu_day $(if $(DRY),--dry)

PYTHON ?= $(if $(wildcard .venv/.ready),$(BIN)/python,python3)
contracts: .venv/.ready  ## what the code uses of its libraries, against the installed ones and vLLM's wheels for GPUs: a minute
	$(BIN)/python -m tests.contracts
	$(BIN)/python -m tests.contracts $(WHEELS)

WHEELS ?= vllm==0.32.0 vllm==0.33.0
BASE ?= HEAD

same: .venv/.ready  ## compare six steps of every method with the code of revision BASE, bit for bit: 15 minutes
	$(BIN)/python -m benchmarks.same_run --base $(BASE)

lock: .venv/.ready  ## update the locks of the CPU, GPU and documentation environments after a change of pyproject.toml
	bash scripts/lock.sh

wheel:  ## build the wheel, install it without extras and run the command line; needs only Python
	bash scripts/wheel.sh

docs:  ## build the documentation site into site/ and check its links; needs only Python
	bash scripts/docs.sh

image-cpu image-gpu: image-%:  ## build docker/Dockerfile.cpu or .gpu, and run the command line in it
	docker build --file docker/Dockerfile.$* --tag rlhf:$* .
	docker run --rm rlhf:$* rlhf --version

release-notes:  ## release notes of this version; TAG=v1.2.3 fails for any other version
	@python3 -m scripts.release_notes $(TAG)

clean:
	rm -rf .venv .venv-docs runs dist site .pytest_cache .mypy_cache .ruff_cache
