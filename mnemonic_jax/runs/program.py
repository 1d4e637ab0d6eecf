"""Plan a training: what is compiled, and the abstract arrays that it is compiled for."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import training
from mnemonic_jax.data import Dataset, augmentation
from mnemonic_jax.models import Model, pretrained
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import setup
from mnemonic_jax.runs.config import Config
from mnemonic_jax.training import TrainState


class Program(NamedTuple):
  """What a training compiles, and the abstract arrays, with their shardings, for it."""

  model: Model
  optimizer: optax.GradientTransformation
  init: Any  # () -> (state, codes), each device its own shards
  restart: Any  # (params, model_state, key) -> the state before the first step; params are donated
  batch_step: training.BatchStep  # as it is traced
  step: Any  # the same, jitted; the state is donated
  arguments: tuple[Any, ...]  # of step: state, images, labels, codes, rows, epoch
  steps_per_epoch: int
  total_steps: int

  @property
  def state(self) -> TrainState:
    """The abstract train state."""
    return self.arguments[0]

  @property
  def codes(self) -> Any:
    """The abstract codes."""
    return self.arguments[3]


def make_program(
  config: Config, dataset: Dataset, layout: Layout | None = None, prng_impl: str | None = None
) -> Program:
  """Plan the training of a config; computes nothing and takes no memory.

  Of the data set only its shapes and counts are read. Without `layout`, all is on the first device.

  Raises:
    ValueError: a batch, or a part of it, that does not spread evenly over the devices.
  """
  train, layout = config.train, layout or Layout()
  layout.require_examples("train.batch_size", train.batch_size)
  parts = train.batch_size // train.accumulate
  layout.require_examples("train.batch_size / train.accumulate", parts)
  model, optimizer, steps_per_epoch, total_steps = setup.plan(config, dataset)
  first = partial(setup.first_state, config, dataset, model, optimizer, prng_impl)
  state, codes = jax.eval_shape(first)
  placed, copied, spread = layout.shardings(state), layout.copied, layout.examples

  def restart(params: Any, model_state: Any, key: Any) -> TrainState:
    return training.init_train_state(params, model_state, optimizer, key)

  step = setup.make_step(config, model, optimizer)
  augment = augmentation.NAMES[config.data.augment]
  batch_step = training.make_batch_step(step, dataset.preprocess, augment)
  inputs = (placed, spread, spread, copied, spread, copied)
  size = train.batch_size
  of = lambda sharding, shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  arguments = (
    layout.abstract(state),
    of(spread, (size, *dataset.shape), jnp.uint8),
    of(spread, (size,), jnp.int32),
    of(copied, codes.shape, codes.dtype),
    of(spread, (size,), jnp.int32),
    of(copied, (), jnp.int32),
  )
  return Program(
    model,
    optimizer,
    jax.jit(first, out_shardings=(placed, copied)),
    jax.jit(restart, out_shardings=placed, donate_argnums=0),
    batch_step,
    jax.jit(batch_step, in_shardings=inputs, out_shardings=(placed, copied), donate_argnums=0),
    arguments,
    steps_per_epoch,
    total_steps,
  )


def first_state(config: Config, program: Program) -> tuple[TrainState, jax.Array]:
  """Make the state and codes before the first step, with the weights of `model.pretrained`.

  Each device gets its own shards alone, of the file too.
  """
  settings = config.model
  if settings.pretrained:  # a wrong file is told before anything is compiled
    processes.together(partial(pretrained.check, settings.pretrained, settings.name))
  state, codes = program.init()
  if settings.pretrained:
    params, model_state, key = state.params, state.model_state, state.key
    del state  # the optimizer's makes room for the weights
    load = partial(pretrained.load, settings.pretrained, settings.name, params, model_state)
    params, model_state = processes.together(partial(load, new_head=settings.new_head))
    state = program.restart(params, model_state, key)
  return state, codes


def host_key(key: jax.Array) -> jax.Array:
  """Copy a typed key that lies on a mesh to this process's first device."""
  data = np.asarray(jax.random.key_data(key))
  return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(key))
