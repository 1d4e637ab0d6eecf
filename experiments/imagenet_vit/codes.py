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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import job as jobs
import optax
from job import Job

from mnemonic_jax.cli.commands import learning_request
from mnemonic_jax.cli.parser import add_learning_flags
from mnemonic_jax.data import Dataset
from mnemonic_jax.learning import match, reads, recall
from mnemonic_jax.learning.learner import RECALLED
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import learned, ledger, setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config


class Program(NamedTuple):
  """One of the steps that `learn_codes` does, and the abstract arrays that it is compiled for."""

  step: Any
  arguments: tuple[Any, ...]
  count: int  # codes that a step moves


def make_programs(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh
) -> tuple[Program, Program]:
  """Plan one step of learning, and one of recalling as many codes as are recalled by default.

  They are those of `learn_codes`. Computes nothing, takes no memory.
  """
  model, layout = setup.make_model(config, dataset), Layout(mesh)
  params, model_state = map(layout.abstract, jax.eval_shape(model.init, jax.random.key(0)))
  placed = tuple(leaf.sharding for leaf in jax.tree.leaves(params))
  statistics_fn = model.statistics_fn(model_state)
  num_classes, size = len(dataset.class_names), _at_once(config, mesh)
  functions, arrays = reads.split(
    model.logits_fn(model_state), None, statistics_fn, params, num_classes, "highest", placed
  )
  of = lambda *shape, dtype=jnp.float32, where=layout.copied: jax.ShapeDtypeStruct(
    shape, dtype, sharding=where
  )
  whole = lambda *shape: of(*shape, dtype=jnp.int32)

  def state(count: int) -> match.State:
    inputs = of(count, *dataset.shape, where=layout.examples)
    return match.State(inputs, optax.ScaleByAdamState(whole(), inputs, inputs))

  shapes, _ = reads.check_shapes(functions, arrays, of(size, *dataset.shape), reads=True)
  vectors, deviations = ([of(*x.shape[at:]) for x in shapes] for at in (0, 1))
  targets = match.Targets(vectors, deviations, [of(size)] * len(shapes))
  first, rate = (functions, jnp.dtype(jnp.float32), arrays), (of(), of(*dataset.shape))
  learning = Program(match.step_program, (*first, state(size), targets, *rate), size)
  count, batch = num_classes * RECALLED, min(size, recall.AT_ONCE)
  if count <= size:
    arguments = (*first, state(count), whole(count), *rate)
    return learning, Program(recall.step_program, arguments, count)
  drawn = whole(batch), whole(batch), whole()  # rows, their labels, the step
  arguments = (*first, state(count), *drawn, *rate)
  return learning, Program(recall.step_of_some_program, arguments, batch)


def _at_once(config: Config, mesh: jax.sharding.Mesh) -> int:
  """How many codes a step takes: the same on all processes, whatever memory each has."""
  return config.execution.microbatch or jobs.EXAMPLES_PER_DEVICE * mesh.size


def learn(job: Job) -> dict[str, Any]:
  """Learn or recall the codes of a job's run."""
  request, path, layout = learning_request(job.options), learned.path_in(job.run), Layout(job.mesh)
  with job.run.locked():
    learned.refuse_existing(path)
    job.watchdog.phase("restoring the checkpoint")
    trained = trained_run.restore(job.run, job.dataset, layout)
    told = learned.learn(
      trained,
      job.config,
      job.dataset,
      path,
      request,
      layout=layout,
      watchdog=job.watchdog,
      microbatch=_at_once(job.config, job.mesh),
    )
    ledger.record(job.run)
    return told


SCRIPT = jobs.Script(
  learn,
  __doc__,
  add_learning_flags,
  sections=("execution",),
  trains=lambda options: not options.recall,
)

if __name__ == "__main__":
  jobs.main(SCRIPT, sys.argv[1:])
