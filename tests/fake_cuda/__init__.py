"""A cluster of GPUs that is not there, with the rules of CUDA, NCCL and Ray that a CPU does not have.

The package's own launcher, workers, engines, senders and receivers, and vLLM's weight transfer, run over it unchanged.
Every process is a few threads, and memory on a GPU is a number, beside tiny tensors that are really moved.

`machine` has processes, the GPUs that each one sees, and memory; `collectives` process groups that name a missing or
misordered call in place of hanging; `cuda` what torch is asked for; `fake_ray` the scheduler; `models` a policy and
vLLM's core; `run` puts a run together.
"""
