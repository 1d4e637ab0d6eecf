"""From a config to the objects of a run: model, optimizer, first train state, codes."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemonic_jax import blending, models, pretrained
from mnemonic_jax import codes as codes_stage
from mnemonic_jax.config import Config, TrainConfig
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import Model
from mnemonic_jax.training import BlendFn, TrainState, init_train_state, with_ema


class Setup(NamedTuple):
  """What training starts from; the same config always gives the same."""

  model: Model
  optimizer: optax.GradientTransformation
  state: TrainState
  codes: jax.Array
  steps_per_epoch: int
  total_steps: int


def make(config: Config, dataset: Dataset, prng_impl: str | None = None) -> Setup:
  """Build the model, the optimizer, the first state and the codes of a config."""
  train = config.train
  steps_per_epoch = dataset.train.num_examples // train.batch_size
  if not steps_per_epoch:
    raise MnemonicError(
      f"train.batch_size: got {train.batch_size} for {dataset.train.num_examples} training examples; expected at most that."
    )
  model = make_model(config, dataset)
  params_key, codes_key, train_key = jax.random.split(jax.random.key(train.seed, impl=prng_impl), 3)
  params, model_state = model.init(params_key)
  codes = codes_stage.make_codes(
    codes_key,
    len(dataset.class_names),
    dataset.shape,
    per_class=config.codes.per_class,
    distribution=config.codes.distribution,
  )
  total = train.steps or train.epochs * steps_per_epoch
  optimizer = make_optimizer(train, total)
  state = init_train_state(params, model_state, optimizer, train_key)
  return Setup(model, optimizer, state, codes, steps_per_epoch, total)


def make_model(config: Config, dataset: Dataset) -> Model:
  """Build the model of a config for the images and classes of a data set."""
  settings = dataclasses.asdict(config.model) | {"dtype": jnp.dtype(config.model.dtype)}
  del settings["pretrained"], settings["new_head"]  # what training starts from
  num_classes = len(dataset.class_names)
  text_file = settings.pop("text_embeddings")
  text = pretrained.load_text_embeddings(text_file, num_classes) if text_file else None
  try:
    return models.make(**settings, text=text, shape=dataset.shape, num_classes=num_classes)
  except ValueError as error:
    raise MnemonicError(f"model.name: {config.model.name!r} cannot take {dataset.name}: {error}") from error


def make_optimizer(train: TrainConfig, steps: int) -> optax.GradientTransformation:
  """SGD with momentum; weight decay is added to the gradient, as in the paper's framework."""
  rate: Any = train.learning_rate
  if train.schedule == "cosine":
    rate = optax.cosine_decay_schedule(train.learning_rate, steps)
  sgd = optax.sgd(rate, momentum=train.momentum or None)
  optimizer = optax.chain(optax.add_decayed_weights(train.weight_decay), sgd)
  return with_ema(optimizer, train.ema) if train.ema else optimizer


def make_blend(train: TrainConfig) -> BlendFn | None:
  """Mixup, CutMix or neither."""
  if train.mixup:
    return partial(blending.mixup, alpha=train.mixup)
  return partial(blending.cutmix, alpha=train.cutmix) if train.cutmix else None


def array_sha256(array: Any) -> str:
  """SHA-256 of an array's bytes in C order."""
  return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()
