"""From a config to the objects of a run: model, optimizer, first state, the compiled train step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import codes as codes_stage
from mnemonic_jax import data, models, training
from mnemonic_jax.data import Dataset, Stream, augmentation
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.models import Model, pretrained
from mnemonic_jax.multihost import processes, sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs.config import Config, TrainConfig
from mnemonic_jax.training import BlendFn, TrainState, init_train_state, with_ema


def load_data(config: Config, data_dir: str = "", *, training: bool = True) -> Dataset:
  """Load the data set of a config, from `data_dir` if given, else from the config's own."""
  settings = config.data
  return data.load(
    settings.name,
    data_dir or settings.data_dir,
    side=settings.side,
    augment=settings.augment,
    normalization=settings.normalization,
    training=training,
  )


def make_layout(config: Config, dataset: Dataset) -> Layout:
  """Choose the devices of a training.

  All of them for a streamed set, for several processes, and where a config says how large an axis
  of the mesh is; else the first one. Sizes of 1 and 1 mean the first one too.
  """
  data, fsdp = config.execution.data, config.execution.fsdp
  asked = data or fsdp or isinstance(dataset.train, Stream)
  if not processes.several() and (not asked or data == fsdp == 1):
    return Layout()
  try:
    mesh = sharding.make_mesh(data or None, fsdp or None)
  except ValueError as error:
    raise UsageError(f"execution.data, execution.fsdp: {error}") from None
  return Layout(mesh if mesh.size > 1 else None)


def plan(config: Config, dataset: Dataset) -> tuple[Model, optax.GradientTransformation, int, int]:
  """Make what needs no arrays: the model, the optimizer, steps per epoch and in all."""
  train = config.train
  steps_per_epoch = dataset.train.num_examples // train.batch_size
  if not steps_per_epoch:
    raise MnemonicError(
      f"train.batch_size: got {train.batch_size} for {dataset.train.num_examples} training "
      "examples; expected at most that."
    )
  total = train.steps or train.epochs * steps_per_epoch
  return make_model(config, dataset), make_optimizer(train, total), steps_per_epoch, total


def init_state(
  config: Config,
  dataset: Dataset,
  model: Model,
  optimizer: optax.GradientTransformation,
  prng_impl: str | None = None,
) -> tuple[TrainState, jax.Array]:
  """Make the state and codes before the first step.

  It is traceable, so that each device makes its own shards alone.
  """
  params_key, codes_key, train_key = jax.random.split(
    jax.random.key(config.train.seed, impl=prng_impl), 3
  )
  params, model_state = model.init(params_key)
  codes = codes_stage.make_codes(
    codes_key,
    len(dataset.class_names),
    dataset.shape,
    per_class=config.codes.per_class,
    distribution=config.codes.distribution,
  )
  return init_train_state(params, model_state, optimizer, train_key), codes


def make_model(config: Config, dataset: Dataset, text: np.ndarray | None = None) -> Model:
  """Build the model of a config for the images and classes of a data set.

  `text` stands for what is in the config's file of text embeddings, which then is not read.
  """
  settings = dataclasses.asdict(config.model) | {"dtype": jnp.dtype(config.model.dtype)}
  del settings["pretrained"], settings["new_head"]  # what training starts from
  num_classes = len(dataset.class_names)
  text_file = settings.pop("text_embeddings")
  if text_file and text is None:
    text = pretrained.load_text_embeddings(text_file, num_classes)
  try:
    return models.make(**settings, text=text, shape=dataset.shape, num_classes=num_classes)
  except ValueError as error:
    raise MnemonicError(
      f"model.name: {config.model.name!r} cannot take {dataset.name}: {error}"
    ) from error


def make_optimizer(train: TrainConfig, steps: int) -> optax.GradientTransformation:
  """SGD with weight decay added to the gradient, as in the paper's framework, or AdamW."""
  rate: Any = train.learning_rate
  if train.schedule == "cosine":
    rate = optax.cosine_decay_schedule(train.learning_rate, max(steps - train.warmup_steps, 1))
  if train.warmup_steps:
    warm_up = optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)
    after = rate if callable(rate) else optax.constant_schedule(rate)
    rate = optax.join_schedules([warm_up, after], [train.warmup_steps])
  if train.optimizer == "adamw":
    optimizer = optax.adamw(rate, b1=train.momentum, weight_decay=train.weight_decay, mask=_kernels)
  else:
    sgd = optax.sgd(rate, momentum=train.momentum or None)
    optimizer = optax.chain(optax.add_decayed_weights(train.weight_decay), sgd)
  if train.clip_norm:
    optimizer = optax.chain(optax.clip_by_global_norm(train.clip_norm), optimizer)
  return with_ema(optimizer, train.ema) if train.ema else optimizer


def make_blend(train: TrainConfig) -> BlendFn | None:
  """Mixup, CutMix or neither, then label smoothing; None where a config asks for none of them."""
  blend: BlendFn | None = None
  if train.mixup:
    blend = partial(augmentation.mixup, alpha=train.mixup)
  elif train.cutmix:
    blend = partial(augmentation.cutmix, alpha=train.cutmix)
  if not train.label_smoothing:
    return blend

  def smoothed(
    key: jax.Array, images: jax.Array, targets: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    images, targets = blend(key, images, targets) if blend else (images, targets)
    return images, optax.smooth_labels(targets, train.label_smoothing)

  return smoothed


def _kernels(params: Any) -> Any:
  """Which params AdamW's decay shrinks: no bias, no scale, no position."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) == "kernel", params
  )


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
  model, optimizer, steps_per_epoch, total_steps = plan(config, dataset)
  first = partial(init_state, config, dataset, model, optimizer, prng_impl)
  state, codes = jax.eval_shape(first)
  placed, copied, spread = layout.shardings(state), layout.copied, layout.examples

  def restart(params: Any, model_state: Any, key: Any) -> TrainState:
    return init_train_state(params, model_state, optimizer, key)

  step = training.make_train_step(
    model.apply,
    optimizer,
    rate=config.codes.rate,
    blend=make_blend(train),
    accumulate=train.accumulate,
  )
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


def forward_flops(config: Config, dataset: Dataset) -> float:
  """Return the FLOPs of one image forward, as XLA counts them.

  Of the model without scan, whose body XLA would count once.
  """
  plain = dataclasses.replace(config.model, scan=False, remat=False, dtype="float32")
  model = make_model(dataclasses.replace(config, model=plain), dataset)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, *dataset.shape), jnp.float32)
  forward = jax.jit(lambda p, s, x: model.apply(p, s, x, False)[0])
  return float((forward.lower(params, model_state, image).cost_analysis() or {}).get("flops", 0.0))
