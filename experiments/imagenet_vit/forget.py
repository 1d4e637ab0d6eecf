"""Forget classes of a run on all devices there are, without gathering the model anywhere.

Command:  python experiments/imagenet_vit/forget.py RUN --classes 0 [--data-dir DIR] \
[--execution.fsdp 8] [--search]

RUN is one of train.py or of `mnemonic train`. The codes are spread over all devices; Fishers are
summed onto the shards of the params, and the update is made there. Writes RUN/forgets/NNNN like
`mnemonic forget`: each request starts from the checkpoint and all classes asked for so far.
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
from job import Job

import mnemonic_jax as mj
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.models import Model
from mnemonic_jax.multihost import sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.files import to_host
from mnemonic_jax.runs.scoring import predict_each
from mnemonic_jax.runs.trained import Trained

# Codes that a device sees at once, where execution.microbatch does not say how many all see.
CODES_PER_DEVICE = 16
# The paper's grid: powers of ten.
_POWERS = itertools.product(range(-6, 1), range(-1, 6))
GRID = [(10.0**first, 10.0**second) for first, second in _POWERS]


class Program(NamedTuple):
  """A forget, and the abstract arrays, with their shardings, that it is compiled for."""

  model: Model
  step: Any  # (params, model_state, codes, forget, remain, method) -> (params, info)
  arguments: tuple[Any, ...]  # all but the method; codes are filled up to a multiple of the devices


def make_program(
  config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, model: Model | None = None
) -> Program:
  """Plan the forgetting of a config's model, or of `model`; computes nothing, takes no memory."""
  model, layout = model or setup.make_model(config, dataset), Layout(mesh)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  placed, state_placed = layout.shardings(params), layout.shardings(model_state)
  copied, spread = layout.copied, layout.examples
  num_classes = len(dataset.class_names)
  microbatch = config.execution.microbatch or CODES_PER_DEVICE * mesh.size

  def step(
    params: Any, model_state: Any, codes: Any, forget: Any, remain: Any, method: Any
  ) -> tuple[Any, mj.ForgetInfo]:
    return mj.forget_step(
      model.logits_fn(model_state),
      params,
      codes[:num_classes],
      forget,
      remain,
      method,
      layer_axis=model.layer_axis,
      precision=config.forget.precision,
      execution=mj.Execution(microbatch, placed),
    )

  inputs = (placed, state_placed, spread, copied, copied, copied)
  padded = -(-num_classes // mesh.size) * mesh.size
  shape = (padded, config.codes.per_class, *dataset.shape)
  mask = jax.ShapeDtypeStruct((num_classes,), bool, sharding=copied)
  codes = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread)
  return Program(
    model,
    jax.jit(step, in_shardings=inputs, out_shardings=(placed, copied)),
    (layout.abstract(params), layout.abstract(model_state), codes, mask, mask),
  )


def forget(job: Job) -> dict[str, Any]:
  """Forget the classes of a job, and all that its run was asked to forget before."""
  config, dataset, run, layout = job.config, job.dataset, job.run, Layout(job.mesh)
  with run.locked():
    earlier = run.forgotten_classes()
    asked = forget_run.check_request(config, job.classes, dataset.class_names, earlier)
    job.watchdog.phase("restoring the checkpoint")
    trained = trained_run.restore(run, dataset, layout)
    trained = trained._replace(codes=to_host(trained.codes))
    program = make_program(config, dataset, job.mesh, trained.model)
    method = _grid(asked.method) if job.search else asked.method
    one_shot = lambda params: _one_shot(job, program, trained, params, asked.classes, method)
    predict = lambda candidates, split: predict_each(
      trained.logits_fn, candidates, split, dataset.preprocess, layout, job.watchdog
    )
    report, fill = forget_run.described(trained, config, dataset, asked, one_shot, predict)
    job.watchdog.phase("writing the forget")
    folder = run.add_forget(fill)
  return {
    **report,
    "mesh": dict(job.mesh.shape),
    "processes": jax.process_count(),
    "folder": str(folder),
  }


def _grid(method: Any) -> mj.Perturbation:
  """The paper's grid as one method, which tries all pairs."""
  if not isinstance(method, mj.Perturbation):
    raise UsageError(f"--search: got {type(method).__name__}; only Perturbation has a grid.")
  return mj.Perturbation(*(np.asarray(values) for values in zip(*GRID, strict=True)))


def place_codes(codes: np.ndarray, program: Program) -> jax.Array:
  """Put codes on the host, (C, K, *shape), over all devices, filled up with zeros."""
  wanted = program.arguments[2]
  filler = np.zeros((wanted.shape[0] - len(codes), *codes.shape[1:]), codes.dtype)
  padded = np.concatenate([codes, filler])
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: padded[index])


def _one_shot(
  job: Job, program: Program, trained: Trained, params: Any, classes: list[int], method: Any
) -> mj.ForgetResult:
  """Forget in one copy of the params."""
  start = time.perf_counter()
  chosen = np.isin(np.arange(len(job.dataset.class_names)), classes)
  copied = sharding.replicated(job.mesh)
  put = lambda value: jax.device_put(np.asarray(value, np.float32), copied)
  sides = (jax.device_put(chosen, copied), jax.device_put(~chosen, copied))
  codes = place_codes(trained.codes, program)
  arguments = (params, trained.model_state, codes, *sides, jax.tree.map(put, method))
  job.watchdog.phase("compiling the forget")
  step = program.step.lower(*arguments).compile()
  job.watchdog.phase("the forget")
  compiled = time.perf_counter()
  moved, info = jax.block_until_ready(step(*arguments))
  end = time.perf_counter()
  job.watchdog.phase("what follows the forget")
  info = jax.device_get(info)
  if not np.isfinite(info.code_retain_accuracy):
    raise MnemonicError(
      f"forget: {method} drives params or logits on the codes to NaN or inf, or they were so "
      "before. Use smaller settings of forget, or another checkpoint."
    )
  seconds = {"compile": compiled - start, "method": end - compiled, "total": end - start}
  return mj.ForgetResult(
    moved,
    _as_given(method, info.method),
    float(info.code_retain_accuracy),
    float(info.code_forget_error),
    {name: np.asarray(value).item() for name, value in info.info.items()},
    seconds,
  )


def _as_given(method: Any, found: Any) -> Any:
  """The numbers that were kept as they were given, not rounded to float32."""

  def pick(given: Any, kept: Any) -> Any:
    values = np.ravel(given)
    return values[np.argmin(np.abs(values.astype(np.float32) - kept))].item()

  return jax.tree.map(pick, method, found)


if __name__ == "__main__":
  jobs.main(forget, __doc__, sys.argv[1:])
