"""A plain CNN from Equinox, without BatchNorm, trained by AdamW: a model that is not the library's.

Three convolutions of 3x3 with a ReLU and 2x2 max-pooling each, a mean over positions, a linear
head. `beyond.py --equinox` trains it in place of the config's model.
"""

from __future__ import annotations

import pathlib
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from mnemonic_jax import softmax_cross_entropy
from mnemonic_jax.data import Dataset
from mnemonic_jax.models import Model
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.trained import Trained

WIDTHS = (16, 32, 64)
EPOCHS, BATCH, RATE, DECAY = 6, 128, 2e-3, 1e-2


def make(dataset: Dataset) -> Model:
  """The model as pure functions, for the shape and classes of a data set."""
  widths = (dataset.shape[-1], *WIDTHS)

  def layers(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, len(WIDTHS) + 1)
    pairs = zip(widths[:-1], WIDTHS, keys[:-1], strict=True)
    convolutions = [eqx.nn.Conv2d(old, new, 3, padding=1, key=k) for old, new, k in pairs]
    head = eqx.nn.Linear(WIDTHS[-1], len(dataset.class_names), key=keys[-1])
    return {f"conv{i}": layer for i, layer in enumerate(convolutions, 1)} | {"head": head}

  shapes = eqx.filter_eval_shape(layers, jax.random.key(0))
  arrays = lambda layer: (layer.weight, layer.bias)
  pool = eqx.nn.MaxPool2d(2, 2)

  def init(key: jax.Array) -> tuple[Any, Any]:
    return {name: {"weight": x.weight, "bias": x.bias} for name, x in layers(key).items()}, {}

  def layer(params: Any, name: str) -> Any:
    own = params[name]["weight"], params[name]["bias"]
    return jax.vmap(eqx.tree_at(arrays, shapes[name], own))

  def stages(params: Any, state: Any, inputs: jax.Array) -> dict[str, jax.Array]:
    x, found = jnp.moveaxis(inputs, -1, 1), {}
    for name in list(shapes)[:-1]:
      x = jax.vmap(pool)(jax.nn.relu(layer(params, name)(x)))
      found[name] = jnp.moveaxis(x, 1, -1)
    return found | {"features": x.mean((2, 3))}

  def features(params: Any, state: Any, inputs: jax.Array) -> jax.Array:
    return stages(params, state, inputs)["features"]

  def apply(params: Any, state: Any, inputs: jax.Array, train: Any) -> tuple[jax.Array, Any]:
    return layer(params, "head")(features(params, state, inputs)), state

  return Model(init, apply, features, stages, ("head",))


def trained(folder: pathlib.Path, dataset: Dataset, config: Config) -> Trained:
  """Train into `folder`, or resume after the last whole epoch, or take what is there."""
  model, seed = make(dataset), config.train.seed
  images, labels = np.asarray(dataset.train.images), np.asarray(dataset.train.labels)
  steps = len(labels) // BATCH
  schedule = optax.cosine_decay_schedule(RATE, EPOCHS * steps)
  optimizer = optax.adamw(schedule, weight_decay=DECAY)
  logits_fn = model.logits_fn({})

  @jax.jit
  def step(params: Any, state: Any, pictures: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    inputs = dataset.preprocess(pictures)
    loss = lambda params: softmax_cross_entropy(logits_fn(params, inputs), labels).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params, _ = model.init(jax.random.key(seed))
  tree = {"params": params, "state": optimizer.init(params)}
  where = epath.Path(folder).absolute() / "checkpoints"
  with ocp.CheckpointManager(where, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as kept:
    if done := kept.latest_step() or 0:
      tree = kept.restore(done, args=ocp.args.StandardRestore(tree))
    for epoch in range(done, EPOCHS):
      started = time.perf_counter()
      order = np.random.default_rng((seed, epoch)).permutation(len(labels))
      params, state = tree["params"], tree["state"]
      for rows in order[: steps * BATCH].reshape(steps, BATCH):
        params, state = step(params, state, images[rows], labels[rows])
      tree = {"params": params, "state": state}
      kept.save(epoch + 1, args=ocp.args.StandardSave(tree))
      seconds = time.perf_counter() - started
      print(
        f"{folder}: epoch {epoch + 1} of {EPOCHS}, {seconds:.0f} s", file=sys.stderr, flush=True
      )
  return Trained(model, tree["params"], None, {}, None, where / str(EPOCHS), logits_fn)
