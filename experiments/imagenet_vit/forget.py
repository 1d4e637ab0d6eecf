"""Forget classes of a run of train.py (or of `mnemonic train`) on all devices there are, without gathering the model anywhere.

Command:  python experiments/imagenet_vit/forget.py RUN --classes 0 [--data-dir DIR] [--execution.fsdp 8] [--search]

The codes are spread over all devices; Fishers are summed onto the shards of the params, and the update is made there.
Writes RUN/forgets/NNNN like `mnemonic forget`: each request starts from the checkpoint and all classes asked for so far.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import Job

import mnemonic_jax as mj
from mnemonic_jax import forgetting, sharding
from mnemonic_jax.config import Config
from mnemonic_jax.data import Dataset
from mnemonic_jax.models import Model
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.trained import Trained

# Codes that a device sees at once, where execution.microbatch does not say how many all see.
CODES_PER_DEVICE = 16
# The paper's grid: powers of ten.
GRID = list(itertools.product((10.0**power for power in range(-6, 1)), (10.0**power for power in range(-1, 6))))


class Program(NamedTuple):
  """The two halves of a forget, and the abstract arrays, with their shardings, that they are compiled for."""

  model: Model
  fishers: Any  # (params, model_state, codes, forget, remain) -> (f_F, f_R)
  update: Any  # (params, model_state, codes, forget, remain, fishers, strength) -> (params, info); fishers are donated
  arguments: tuple[Any, ...]  # params, model_state, codes, forget, remain
  shardings: Any  # of the params


def make_program(config: Config, dataset: Dataset, mesh: jax.sharding.Mesh) -> Program:
  """Plan the forgetting of a config on a mesh; computes nothing and takes no memory."""
  model = setup.make_model(config, dataset)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  placed, state_placed = sharding.tree_shardings(mesh, params), sharding.tree_shardings(mesh, model_state)
  copied = sharding.replicated(mesh)
  num_classes = len(dataset.class_names)
  codes_shape = (num_classes, config.codes.per_class, *dataset.shape)
  spread = sharding.codes_sharding(mesh, codes_shape)
  microbatch = config.execution.microbatch or CODES_PER_DEVICE * mesh.size
  options = {"precision": config.forget.precision, "execution": mj.Execution(microbatch, placed)}

  def fishers(params: Any, model_state: Any, codes: Any, forget: Any, remain: Any) -> Any:
    return forgetting.code_fishers(model.logits_fn(model_state), params, codes, forget, remain, **options)

  def update(params: Any, model_state: Any, codes: Any, forget: Any, remain: Any, fishers: Any, strength: Any) -> Any:
    logits_fn, axis = model.logits_fn(model_state), model.layer_axis
    return forgetting.update_step(
      logits_fn, params, codes, forget, remain, fishers, strength, layer_axis=axis, **options
    )

  inputs = (placed, state_placed, spread, copied, copied)
  mask = jax.ShapeDtypeStruct((num_classes,), bool, sharding=copied)
  return Program(
    model,
    jax.jit(fishers, in_shardings=inputs, out_shardings=(placed, placed)),
    jax.jit(
      update,
      in_shardings=(*inputs, (placed, placed), copied),
      out_shardings=(placed, copied),
      donate_argnums=5,
    ),
    (
      common.abstract(params, placed),
      common.abstract(model_state, state_placed),
      jax.ShapeDtypeStruct(codes_shape, jnp.float32, sharding=spread),
      mask,
      mask,
    ),
    placed,
  )


def forget(job: Job) -> dict[str, Any]:
  """Forget the classes of a job, and all that its run was asked to forget before, and write forgets/NNNN."""
  config, dataset, run, mesh = job.config, job.dataset, job.run, job.mesh
  num_classes = len(dataset.class_names)
  with run.locked():
    classes = forget_run.check_request(config, job.classes, num_classes, run.forgotten_classes())
    program = make_program(config, dataset, mesh)
    trained = _restored(job, program)
    one_shot = lambda params: _one_shot(job, program, trained, params, classes)
    predict = lambda candidates, split: common.predict(job, program.model, candidates, trained.model_state, split)
    report, fill = forget_run.described(trained, config, dataset, job.classes, classes, one_shot, predict)
    folder = run.add_forget(fill)
  return {**report, "mesh": dict(mesh.shape), "processes": jax.process_count(), "folder": str(folder)}


def _restored(job: Job, program: Program) -> Trained:
  """The finished training of a run, each device its own shards."""

  def place(state: Any, codes: Any) -> Any:
    return common.abstract(state, sharding.tree_shardings(job.mesh, state)), program.arguments[2]

  return trained_run.restore(job.run, job.dataset, place)


def _one_shot(job: Job, program: Program, trained: Trained, params: Any, classes: list[int]) -> mj.ForgetResult:
  """Forget in one copy of the params."""
  start = time.perf_counter()
  chosen = np.isin(np.arange(len(job.dataset.class_names)), classes)
  copied = sharding.replicated(job.mesh)
  sides = (jax.device_put(chosen, copied), jax.device_put(~chosen, copied))
  arguments = (params, trained.model_state, trained.codes, *sides)
  settings = job.config.forget
  lambdas = zip(*GRID, strict=True) if job.search else (settings.lambda1, settings.lambda2)
  strength = mj.Strength(*(jax.device_put(np.asarray(values, np.float32), copied) for values in lambdas))
  fishers_of = program.fishers.lower(*arguments).compile()
  update = program.update.lower(*arguments, *_abstract_fishers(program), strength).compile()
  compiled = time.perf_counter()
  fishers = jax.block_until_ready(fishers_of(*arguments))
  measured = time.perf_counter()
  moved, info = jax.block_until_ready(update(*arguments, fishers, strength))
  end = time.perf_counter()
  info = jax.device_get(info)
  seconds = {
    "compile": compiled - start,
    "fisher": measured - compiled,
    "perturb": end - measured,
    "total": end - start,
  }
  return mj.ForgetResult(
    moved,
    int(info.sign),
    mj.Strength(float(info.strength.lambda1), float(info.strength.lambda2)),
    float(info.code_retain_accuracy),
    float(info.code_forget_error),
    seconds,
  )


def _abstract_fishers(program: Program) -> tuple[Any]:
  """Shapes of the Fishers: those of the params, in float32."""
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), program.arguments[0])
  return ((one, one),)


if __name__ == "__main__":
  common.main(forget, __doc__, sys.argv[1:])
