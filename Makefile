.PHONY: setup quickstart check lint types unit test integration torture chaos soak bench lock wheel docs image-cpu \
	image-gpu release-notes clean bench-learning bench-lag bench-preferences bench-addition bench-planning bench-trl same

BIN := .venv/bin

setup: .venv/.ready

.venv/.ready: requirements/cpu.lock pyproject.toml scripts/setup.sh
	bash scripts/setup.sh

quickstart: .venv/.ready  ## SFT, reward model and PPO on a tiny model of its own, with a table of what it learned
	$(BIN)/rlhf quickstart

check: .venv/.ready  ## ruff, mypy --strict and the unit tests, side by side: about a minute
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types unit

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

unit: .venv/.ready
	$(BIN)/pytest -q -n auto --dist loadfile tests/unit

integration: .venv/.ready
	$(BIN)/pytest -q --durations=15 tests/integration

test: unit integration  ## every test, with the real Ray, vLLM and DeepSpeed

torture: .venv/.ready  ## 200 kills and full disks while saving, 12,000 configs and 36,000 data files: ten minutes
	RLHF_TEST_TORTURES=200 RLHF_TEST_EXAMPLES=4000 $(BIN)/pytest -q -o timeout=3600 \
		tests/unit/orchestrator/run/test_checkpoint.py tests/unit/config/loading/test_fuzz.py tests/unit/orchestrator/data/test_fuzz.py

chaos: .venv/.ready  ## PPO with every process killed in every phase, 48 faults for each of three seeds: three hours
	for seed in 0 1 2; do $(BIN)/rlhf chaos ppo configs/ppo_stories_cpu.yaml --train.num-steps 60 \
		--run.name chaos-$$seed --chaos-seed $$seed --num-faults 48 --kinds kill,tear || exit 1; done

soak: .venv/.ready  ## 1,000 steps of PPO in peace and under kills 30 s apart: whether anything grows or is left: an hour
	$(BIN)/python -m benchmarks.soak

bench: .venv/.ready  ## the benchmarks, each of which prints a table
	$(BIN)/python -m benchmarks.run

bench-learning: .venv/.ready  ## whether each online method learns on real parts: half an hour
	$(BIN)/python -m benchmarks.learning

bench-lag: .venv/.ready  ## GRPO with rollouts of older weights, with importance correction and without
	$(BIN)/python -m benchmarks.learning --lag

bench-preferences: .venv/.ready  ## what each loss on pairs, and KTO, learns from pairs, and DPO from real dialogues
	$(BIN)/python -m benchmarks.preferences
	$(BIN)/python -m benchmarks.preferences --hh

bench-addition: .venv/.ready  ## a model made on the spot learns addition by SFT, then GRPO: ten minutes
	$(BIN)/python -m benchmarks.addition

bench-planning: .venv/.ready  ## what `rlhf plan` says of three sizes on CPU beside what was measured: eight minutes
	$(BIN)/python -m benchmarks.planning

bench-trl: .venv/.ready  ## side by side with TRL
	$(BIN)/python -m benchmarks.beside_trl

BASE ?= HEAD

same: .venv/.ready  ## whether six steps of every method give the same numbers as with the code of BASE: 15 minutes
	$(BIN)/python -m benchmarks.same_run --base $(BASE)

lock: .venv/.ready  ## pin the CPU, GPU and documentation environments again after a change of pyproject.toml
	bash scripts/lock.sh

wheel:  ## build the wheel, install it alone and run the command line from there; needs only Python
	bash scripts/wheel.sh

docs:  ## build the documentation site into site/, with links checked; needs only Python
	bash scripts/docs.sh

image-cpu image-gpu: image-%:  ## build docker/Dockerfile.cpu or .gpu, and run the command line in it
	docker build --file docker/Dockerfile.$* --tag rlhf:$* .
	docker run --rm rlhf:$* rlhf --version

release-notes:  ## notes of this version; with TAG=v1.2.3 they are refused for any other version
	@python3 -m scripts.release_notes $(TAG)

clean:
	rm -rf .venv .venv-docs runs dist site .pytest_cache .mypy_cache .ruff_cache
