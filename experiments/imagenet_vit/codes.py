"""Learn the codes of a trained run on all devices there are, or recall them from its model alone.

Command:  python experiments/imagenet_vit/codes.py RUN [--data-dir DIR] [--execution.fsdp 8] \
[--recall] [--per-class 8] [--beside 8]

RUN is one of train.py or of `mnemonic train`. Each process decodes its part of the training
pictures; params stay on their shards, and codes are learned with a part of each batch on every
device. Writes RUN/codes/learned.safetensors like `mnemonic codes`. Forget with forget.py beside
this file.
"""

from __future__ import annotations

import sys
from typing import Any

import job as jobs
from job import Job

from mnemonic_jax.cli.commands import learning_request
from mnemonic_jax.cli.parser import add_learning_flags
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import learned
from mnemonic_jax.runs import trained as trained_run


def learn(job: Job) -> dict[str, Any]:
  """Learn or recall the codes of a job's run."""
  request, path, layout = learning_request(job.options), learned.path_in(job.run), Layout(job.mesh)
  microbatch = job.config.execution.microbatch or jobs.EXAMPLES_PER_DEVICE * job.mesh.size
  with job.run.locked():
    learned.refuse_existing(path)
    job.watchdog.phase("restoring the checkpoint")
    trained = trained_run.restore(job.run, job.dataset, layout)
    return learned.learn(
      trained,
      job.config,
      job.dataset,
      path,
      request,
      layout=layout,
      watchdog=job.watchdog,
      microbatch=microbatch,
    )


SCRIPT = jobs.Script(
  learn,
  __doc__,
  add_learning_flags,
  sections=("execution",),
  trains=lambda options: not options.recall,
)

if __name__ == "__main__":
  jobs.main(SCRIPT, sys.argv[1:])
