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

import jax
import jax.numpy as jnp
import job as jobs
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from job import Job

import mnemonic_jax as mj
from mnemonic_jax import forgetting
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import Model
from mnemonic_jax.multihost import sharding
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.hashing import to_host
from mnemonic_jax.runs.trained import Trained

# Codes that a device sees at once, where execution.microbatch does not say how many all see.
CODES_PER_DEVICE = 16
# The paper's grid: powers of ten.
GRID = list(
  itertools.product(
    (10.0**power for power in range(-6, 1)), (10.0**power for power in range(-1, 6))
  )
)


class Program(NamedTuple):
  """The two halves of a forget, and the abstract arrays, with their shardings, that they are compiled for."""

  model: Model
  fishers: Any  # (params, model_state, codes, forget, remain) -> f_F and f_R, (2, *leaf.shape) each
  update: Any  # (params, model_state, codes, forget, remain, fishers, strength) -> (params, info)
  arguments: tuple[
    Any, ...
  ]  # params, model_state, codes (filled up to a multiple of the devices), forget, remain
  fisher: Any  # abstract


def make_program(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, model: Model | None = None
) -> Program:
  """Plan the forgetting of a config's model, or of `model`, on a mesh; computes nothing and takes no memory."""
  model = model or setup.make_model(config, dataset)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  placed, state_placed = (
    sharding.tree_shardings(mesh, params),
    sharding.tree_shardings(mesh, model_state),
  )
  copied = sharding.replicated(mesh)
  num_classes = len(dataset.class_names)
  spread = sharding.batch_sharding(mesh)
  padded_classes = -(-num_classes // mesh.size) * mesh.size
  microbatch = config.execution.microbatch or CODES_PER_DEVICE * mesh.size
  options = {"precision": config.forget.precision, "execution": mj.Execution(microbatch, placed)}

  def fishers(params: Any, model_state: Any, codes: Any, forget: Any, remain: Any) -> Any:
    codes = codes[:num_classes]
    return forgetting.code_fishers(
      model.logits_fn(model_state), params, codes, forget, remain, **options
    )

  def update(
    params: Any, model_state: Any, codes: Any, forget: Any, remain: Any, fishers: Any, strength: Any
  ) -> Any:
    arguments = (params, codes[:num_classes], forget, remain, fishers, strength)
    return forgetting.update_step(
      model.logits_fn(model_state), *arguments, layer_axis=model.layer_axis, **options
    )

  both = jax.tree.map(lambda p: NamedSharding(mesh, PartitionSpec(None, *p.spec)), placed)
  inputs = (placed, state_placed, spread, copied, copied)
  mask = jax.ShapeDtypeStruct((num_classes,), bool, sharding=copied)
  return Program(
    model,
    jax.jit(fishers, in_shardings=inputs, out_shardings=both),
    jax.jit(update, in_shardings=(*inputs, both, copied), out_shardings=(placed, copied)),
    (
      jobs.abstract(params, placed),
      jobs.abstract(model_state, state_placed),
      jax.ShapeDtypeStruct(
        (padded_classes, config.codes.per_class, *dataset.shape), jnp.float32, sharding=spread
      ),
      mask,
      mask,
    ),
    jax.tree.map(
      lambda x, p: jax.ShapeDtypeStruct((2, *x.shape), jnp.float32, sharding=p), params, both
    ),
  )


def forget(job: Job) -> dict[str, Any]:
  """Forget the classes of a job, and all that its run was asked to forget before, and write forgets/NNNN."""
  config, dataset, run, mesh = job.config, job.dataset, job.run, job.mesh
  with run.locked():
    earlier = run.forgotten_classes()
    asked = forget_run.check_request(config, job.classes, dataset.class_names, earlier)
    job.watchdog.phase("restoring the checkpoint")
    trained = _restored(job)
    program = make_program(config, dataset, mesh, trained.model)
    one_shot = lambda params: _one_shot(job, program, trained, params, asked.classes)
    predict = lambda candidates, split: jobs.predict(
      job, program.model, candidates, trained.model_state, split
    )
    report, fill = forget_run.described(trained, config, dataset, asked, one_shot, predict)
    job.watchdog.phase("writing the forget")
    folder = run.add_forget(fill)
  return {
    **report,
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "folder": str(folder),
  }


def _restored(job: Job) -> Trained:
  """The finished training of a run, each device its own shards."""

  place = lambda tree: jobs.abstract(tree, sharding.tree_shardings(job.mesh, tree))
  trained = trained_run.restore(
    job.run, job.dataset, lambda state, codes: (place(state), place(codes))
  )
  return trained._replace(codes=to_host(trained.codes))


def place_codes(codes: np.ndarray, program: Program) -> jax.Array:
  """Codes on the host (C, K, *shape), filled up with zeros, over all devices of all processes."""
  wanted = program.arguments[2]
  padded = np.concatenate(
    [codes, np.zeros((wanted.shape[0] - len(codes), *codes.shape[1:]), codes.dtype)]
  )
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: padded[index])


def _one_shot(
  job: Job, program: Program, trained: Trained, params: Any, classes: list[int]
) -> mj.ForgetResult:
  """Forget in one copy of the params."""
  start = time.perf_counter()
  chosen = np.isin(np.arange(len(job.dataset.class_names)), classes)
  copied = sharding.replicated(job.mesh)
  sides = (jax.device_put(chosen, copied), jax.device_put(~chosen, copied))
  arguments = (params, trained.model_state, place_codes(trained.codes, program), *sides)
  settings = job.config.forget.settings
  tried = GRID if job.search else [(settings["lambda1"], settings["lambda2"])]
  lambdas = zip(*tried, strict=True) if job.search else tried[0]
  strength = mj.Strength(
    *(jax.device_put(np.asarray(values, np.float32), copied) for values in lambdas)
  )
  job.watchdog.phase("compiling the Fishers")
  fishers_of = program.fishers.lower(*arguments).compile()
  job.watchdog.phase("compiling the update")
  update = program.update.lower(*arguments, program.fisher, strength).compile()
  job.watchdog.phase("the forget")
  compiled = time.perf_counter()
  fishers = jax.block_until_ready(fishers_of(*arguments))
  measured = time.perf_counter()
  moved, info = jax.block_until_ready(update(*arguments, fishers, strength))
  end = time.perf_counter()
  job.watchdog.phase("what follows the forget")
  info = jax.device_get(info)
  if not np.isfinite(info.code_retain_accuracy):
    raise MnemonicError(
      f"forget: {tried[0] if len(tried) == 1 else 'every strength tried'} drives params or logits on the codes to NaN or inf "
      "in both directions, or they were so before. Use a smaller forget.lambda2, or another checkpoint."
    )
  found = info.strength.lambda1, info.strength.lambda2
  kept = next(
    pair for pair in tried if np.array_equal(np.float32(pair), found)
  )  # not rounded to float32
  seconds = {
    "compile": compiled - start,
    "fisher": measured - compiled,
    "perturb": end - measured,
    "total": end - start,
  }
  return mj.ForgetResult(
    moved,
    int(info.sign),
    mj.Strength(*kept),
    float(info.code_retain_accuracy),
    float(info.code_forget_error),
    seconds,
  )


if __name__ == "__main__":
  jobs.main(forget, __doc__, sys.argv[1:])
