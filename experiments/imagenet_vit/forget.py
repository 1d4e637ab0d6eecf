"""Forget classes of a run on all devices there are, without gathering the model anywhere.

Command:  python experiments/imagenet_vit/forget.py RUN --classes 0 [--data-dir DIR] \
[--execution.fsdp 8] [--method projection --set depth=2] [--search]

RUN is one of train.py or of `mnemonic train`. The codes, learned ones where the run has some
(codes.py beside this file), are spread over all devices; Fishers are summed onto the shards of the
params, and the update is made there. Any method of one step will do, with all its settings: nothing
is searched here but the strengths of --search. Writes RUN/forgets/NNNN like `mnemonic forget`: each
request starts from the checkpoint and all classes asked for so far.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from mnemonic_jax import methods
from mnemonic_jax.cli.parser import add_method_flags, method_overrides
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.models import Model
from mnemonic_jax.multihost import sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import learned, ledger, setup
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.files import to_host
from mnemonic_jax.runs.scoring import predict_each
from mnemonic_jax.runs.trained import Trained

# The paper's grid: powers of ten.
_POWERS = itertools.product(range(-6, 1), range(-1, 6))
GRID = [(10.0**first, 10.0**second) for first, second in _POWERS]


class Program(NamedTuple):
  """A forget, and the abstract arrays, with their shardings, that it is compiled for."""

  model: Model
  step: Any  # (params, model_state, codes, forget, remain, method) -> (params, info)
  arguments: tuple[Any, ...]  # all but the method; codes are filled up to a multiple of the devices


def make_program(
  config: Config,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  model: Model | None = None,
  codes: Any = None,
) -> Program:
  """Plan the forgetting of a config's model, or of `model`; computes nothing, takes no memory.

  `codes` says of what shapes they are, an array (C, K, *shape) or `LearnedCodes`; by default they
  are those that a training by the config draws.
  """
  model, layout = model or setup.make_model(config, dataset), Layout(mesh)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  placed, state_placed = layout.shardings(params), layout.shardings(model_state)
  copied, spread = layout.copied, layout.examples
  num_classes = len(dataset.class_names)
  microbatch = config.execution.microbatch or jobs.EXAMPLES_PER_DEVICE * mesh.size

  def step(
    params: Any, model_state: Any, codes: Any, forget: Any, remain: Any, method: Any
  ) -> tuple[Any, mj.ForgetInfo]:
    return mj.forget_step(
      model.logits_fn(model_state),
      params,
      jax.tree.map(lambda x: x[:num_classes], codes),
      forget,
      remain,
      method,
      layer_axis=model.layer_axis,
      precision=config.forget.precision,
      execution=mj.Execution(microbatch, placed),
    )

  if codes is None:
    codes = jax.ShapeDtypeStruct((num_classes, config.codes.per_class, *dataset.shape), jnp.float32)
  filled = -(-num_classes // mesh.size) * mesh.size
  of_all = lambda x: jax.ShapeDtypeStruct((filled, *x.shape[1:]), x.dtype, sharding=spread)
  mask = jax.ShapeDtypeStruct((num_classes,), bool, sharding=copied)
  codes = jax.tree.map(of_all, codes)
  inputs = (placed, state_placed, spread, copied, copied, copied)
  return Program(
    model,
    jax.jit(step, in_shardings=inputs, out_shardings=(placed, copied)),
    (layout.abstract(params), layout.abstract(model_state), codes, mask, mask),
  )


def forget(job: Job) -> dict[str, Any]:
  """Forget the classes of a job, and all that its run was asked to forget before."""
  config, dataset, run, layout = job.config, job.dataset, job.run, Layout(job.mesh)
  with run.locked():
    earlier, path = run.forgotten_classes(), learned.path_in(run)
    names, has_learned = dataset.class_names, path.exists()
    asked = forget_run.check_request(
      config, job.options.classes, names, earlier, learned=has_learned
    )
    method = one_step(asked.method, job.options.search)
    job.watchdog.phase("restoring the checkpoint")
    trained = trained_run.restore(run, dataset, layout)
    if has_learned:
      trained = forget_run.with_learned(trained, path, dataset)
    trained = trained._replace(codes=jax.tree.map(to_host, trained.codes))
    program = make_program(config, dataset, job.mesh, trained.model, of_classes(trained.codes))
    one_shot = lambda params: _one_shot(job, program, trained, params, asked.classes, method)
    predict = lambda candidates, split: predict_each(
      trained.logits_fn, candidates, split, dataset.preprocess, layout, job.watchdog
    )
    report, fill = forget_run.described(trained, config, dataset, asked, one_shot, predict)
    job.watchdog.phase("writing the forget")
    folder = run.add_forget(fill)
    ledger.record(run)
  return {**report, "folder": str(folder)}


def one_step(method: Any, search: bool) -> Any:
  """The method of a request, None for the default one; refuse what is not one program here."""
  method = mj.Projection() if method is None else method
  name, searches = methods.name_of(method), isinstance(method, mj.Perturbation)
  if search and not searches:
    raise UsageError(f"--search: got the method {name}; only perturbation has a grid.")
  if search:
    return mj.Perturbation(*(np.asarray(values) for values in zip(*GRID, strict=True)))
  if isinstance(method, mj.Projection) and method.heal:
    raise UsageError(
      f"forget.settings.heal: got {method.heal} with the method projection; expected 0: on a mesh "
      "a forget is one step. Heal on one device: mnemonic forget RUN --heal."
    )
  if steps := methods.steps_of(method):
    raise UsageError(
      f"forget.method: got {name}, which takes {steps} steps; expected a method of one step: "
      f"projection, drop_row, dampening or perturbation. For {name} use one device: mnemonic "
      "forget RUN."
    )
  for setting in getattr(method, "to_search", ()):
    more = " or --search" if searches else ""
    raise UsageError(
      f"forget.settings.{setting}: missing; {name} would search it, which mnemonic forget RUN does "
      f"on one device. On a mesh pass --set {setting}=NUMBER{more}."
    )
  return method


def of_classes(codes: Any) -> Any:
  """The codes that a method of one step reads, and their judges."""
  if not isinstance(codes, mj.LearnedCodes):
    return codes
  return dataclasses.replace(codes, recalled=codes.recalled[:, :0])


def place_codes(codes: Any, program: Program) -> Any:
  """Put codes on the host, (C, ...) each, over all devices, filled up with zeros."""

  def place(array: np.ndarray, wanted: Any) -> jax.Array:
    filler = np.zeros((wanted.shape[0] - len(array), *array.shape[1:]), array.dtype)
    filled = np.concatenate([array, filler])
    return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: filled[index])

  return jax.tree.map(place, codes, program.arguments[2])


def _one_shot(
  job: Job, program: Program, trained: Trained, params: Any, classes: list[int], method: Any
) -> mj.ForgetResult:
  """Forget in one copy of the params."""
  start = time.perf_counter()
  chosen = np.isin(np.arange(len(job.dataset.class_names)), classes)
  copied = sharding.replicated(job.mesh)
  put = lambda value: jax.device_put(np.asarray(value, np.float32), copied)
  sides = (jax.device_put(chosen, copied), jax.device_put(~chosen, copied))
  codes = place_codes(of_classes(trained.codes), program)
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
  plain = lambda value: value if np.ndim(value) else np.asarray(value).item()
  return mj.ForgetResult(
    moved,
    _as_given(method, info.method),
    float(info.code_retain_accuracy),
    float(info.code_forget_error),
    {name: plain(value) for name, value in info.info.items()},
    seconds,
    info.predicted and info.predicted.plain(),
  )


def _as_given(method: Any, found: Any) -> Any:
  """The numbers that were kept as they were given, not rounded to float32."""

  def pick(given: Any, kept: Any) -> Any:
    values = np.ravel(given)
    return values[np.argmin(np.abs(values.astype(np.float32) - kept))].item()

  return jax.tree.map(pick, method, found)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags of a forget."""
  parser.add_argument("--classes", nargs="+", required=True, help="indices or names")
  add_method_flags(parser)
  parser.add_argument(
    "--search", action="store_true", help="choose the strength from the paper's grid, on the codes"
  )


SCRIPT = jobs.Script(forget, __doc__, add_flags, ("forget", "execution"), method_overrides)

if __name__ == "__main__":
  jobs.main(SCRIPT, sys.argv[1:])
