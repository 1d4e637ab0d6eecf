"""From a config to the objects of a run: model, optimizer, first train state, codes."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import codes as codes_stage
from mnemonic_jax import data, models, training
from mnemonic_jax.data import Dataset, mixup
from mnemonic_jax.data.stream import Stream
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.models import Model, pretrained
from mnemonic_jax.multihost import processes, sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs.config import Config, TrainConfig
from mnemonic_jax.runs.hashing import to_host
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


def first_state(
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


def make_step(
  config: Config, model: Model, optimizer: optax.GradientTransformation
) -> training.Step:
  """Make the train step of a config; see `training.make_train_step`."""
  blend, rate, accumulate = make_blend(config.train), config.codes.rate, config.train.accumulate
  return training.make_train_step(
    model.apply, optimizer, rate=rate, blend=blend, accumulate=accumulate
  )


def make_blend(train: TrainConfig) -> BlendFn | None:
  """Mixup, CutMix or neither, then label smoothing; None where a config asks for none of them."""
  blend: BlendFn | None = None
  if train.mixup:
    blend = partial(mixup.mixup, alpha=train.mixup)
  elif train.cutmix:
    blend = partial(mixup.cutmix, alpha=train.cutmix)
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


def array_sha256(array: Any) -> str:
  """Hash an array's bytes in C order."""
  return hashlib.sha256(np.ascontiguousarray(to_host(array)).tobytes()).hexdigest()
