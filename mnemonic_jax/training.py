"""Train with codes: a train step, and an epoch of such steps in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mnemonic_jax import _checks, losses
from mnemonic_jax.codes import mix

PyTree = Any
# (params, model_state, inputs, train) -> (logits, model_state)
ApplyFn = Callable[[PyTree, PyTree, jax.Array, bool], tuple[jax.Array, PyTree]]
Metrics = dict[str, jax.Array]

# (key, images (N, H, W, C), targets (N, C)) -> (images, targets), such as `mixup` with its alpha
BlendFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

_AUGMENTATION = 2**32 - 1  # the branch of the state's key that no step draws from
_BLENDING = 2**32 - 1  # the branch of a step's key that mixing does not draw from


class TrainState(NamedTuple):
  """Training state. Everything but `key` changes from step to step."""

  params: PyTree  # what may be changed when a class is forgotten
  model_state: PyTree  # running statistics; {} for models without
  optimizer_state: PyTree
  step: jax.Array  # () int32, steps done
  key: jax.Array  # typed key; step s draws from fold_in(key, s)


# (state, images, labels, codes) -> (state, metrics)
Step = Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, Metrics]]
# (state, stored images, labels, codes, rows (B,), epoch) -> (state, metrics)
BatchStep = Callable[
  [TrainState, jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[TrainState, Metrics]
]


def init_train_state(
  params: PyTree, model_state: PyTree, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """Make the state before the first step.

  >>> state = init_train_state({"w": jnp.zeros(3)}, {}, optax.sgd(0.1), jax.random.key(0))
  >>> int(state.step)
  0
  """
  _checks.require_key(key)
  return TrainState(params, model_state, optimizer.init(params), jnp.int32(0), key)


class EmaState(NamedTuple):
  """State of an optimizer that keeps an average of the params."""

  average: PyTree  # like params
  inner: PyTree  # of the optimizer inside


def with_ema(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
  """Let an optimizer keep an exponential moving average of the params that it makes.

      average <- decay * average + (1 - decay) * params

  after each update; it starts as the first params.

  Guarantees:
    The params are the same, bit for bit, as without it. `ema_params` reads the average of a train
    state.

  Args:
    optimizer: any; its update is given the params.
    decay: in [0, 1), 0.999 for example.

  Raises:
    ValueError: a decay outside that range.

  >>> optimizer = with_ema(optax.sgd(1.0), decay=0.75)
  >>> state = init_train_state(jnp.array(0.0), {}, optimizer, jax.random.key(0))
  >>> gradient = jnp.array(-4.0)  # params go from 0 to 4
  >>> updates, after = optimizer.update(gradient, state.optimizer_state, state.params)
  >>> float(ema_params(state._replace(optimizer_state=after)))
  1.0
  """
  if not 0 <= decay < 1:
    raise ValueError(
      f"decay: got {decay}; expected a number of at least 0 and below 1, such as 0.999."
    )

  def init(params: PyTree) -> EmaState:
    # Copies of its own: a train state is donated, and no buffer may be in it twice.
    average = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return EmaState(average, optimizer.init(params))

  def update(gradient: PyTree, state: EmaState, params: PyTree = None) -> tuple[PyTree, EmaState]:
    updates, inner = optimizer.update(gradient, state.inner, params)
    after = optax.apply_updates(params, updates)
    average = jax.tree.map(
      lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), state.average, after
    )
    return updates, EmaState(average, inner)

  return optax.GradientTransformation(init, update)


def ema_params(state: TrainState) -> PyTree | None:
  """Return the average of the params that `with_ema` keeps, or None where there is none."""
  return state.optimizer_state.average if isinstance(state.optimizer_state, EmaState) else None


def make_train_step(
  apply: ApplyFn,
  optimizer: optax.GradientTransformation,
  *,
  rate: float,
  loss: Callable[[jax.Array, jax.Array], jax.Array] = losses.softmax_cross_entropy,
  blend: BlendFn | None = None,
  accumulate: int = 1,
) -> Step:
  """Make the function that does one step of training with codes mixed in.

      images <- mix(fold_in(key, step), images, labels, codes, rate)
      params <- optimizer(gradient of the mean loss)

  With `blend`, labels become one-hot targets, images and targets are blended, and only then do
  codes replace: a replaced row has the code and the one-hot target of its own class, unblended.

  Guarantees:
    Pure, and deterministic in its arguments. The same rows become codes with and without `blend`.

  Args:
    apply: pure function (params, model_state, inputs, train) -> (logits, model_state).
    optimizer: an optax gradient transformation.
    rate: the probability that an example is replaced by a code of its class, the paper's t_mix.
    loss: (logits, labels) -> (N,) losses; with `blend` it is given float32 targets (N, C).
    blend: (key, images, targets) -> (images, targets), such as partial(mixup, alpha=0.2).
    accumulate: parts of a batch, of equal size, whose gradients are computed one after the other
      and averaged: less memory, the same step up to rounding. BatchNorm sees one part at a time.

  Returns:
    step(state, images, labels, codes) -> (state, {"loss": (), "accuracy": ()}), both over the
    mixed batch; the heavier class of a blended example counts as the right one. `codes` are
    (C, K, *shape), floating, in the space that `apply` sees. Jit it, or give it to `make_epoch`.

  >>> apply = lambda params, model_state, inputs, train: (inputs @ params, model_state)
  >>> step = make_train_step(apply, optax.sgd(1.0), rate=0.1)
  >>> state = init_train_state(jnp.zeros((2, 2)), {}, optax.sgd(1.0), jax.random.key(0))
  >>> images, labels, codes = jnp.eye(2), jnp.array([0, 1]), jnp.eye(2)[:, None]
  >>> state, metrics = jax.jit(step)(state, images, labels, codes)
  >>> state.params
  Array([[ 0.25, -0.25],
         [-0.25,  0.25]], dtype=float32)

  Source: Yamashita, Yamada, Shibata (2024), section 3.1.
  """
  _checks.require_rate(rate)
  accumulate = _checks.require_size("accumulate", accumulate)

  def mean_loss(
    params: PyTree, model_state: PyTree, images: jax.Array, targets: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
    logits, model_state = apply(params, model_state, images, True)
    value = jnp.mean(loss(logits, targets))
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return value, ({"loss": value, "accuracy": accuracy}, model_state)

  gradient_of = jax.grad(mean_loss, has_aux=True)

  def step(
    state: TrainState, images: jax.Array, labels: jax.Array, codes: jax.Array
  ) -> tuple[TrainState, Metrics]:
    if len(images) % accumulate:
      raise ValueError(
        f"accumulate: got {accumulate} for a batch of {len(images)}; expected a divisor of it."
      )
    key = jax.random.fold_in(state.key, state.step)
    batch = _mixed(key, images, labels, codes, rate, blend)
    if accumulate == 1:
      gradient, (metrics, model_state) = gradient_of(state.params, state.model_state, *batch)
    else:
      gradient, metrics, model_state = _in_parts(gradient_of, state, batch, accumulate)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    params: PyTree = optax.apply_updates(state.params, updates)
    return TrainState(params, model_state, optimizer_state, state.step + 1, state.key), metrics

  return step


def _mixed(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  codes: jax.Array,
  rate: float,
  blend: BlendFn | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Blend a batch and mix codes in: (images, targets of the loss, classes that are right)."""
  if blend is None:
    return mix(key, images, labels, codes, rate), labels, labels
  own = jax.nn.one_hot(labels, len(codes), dtype=jnp.float32)
  images, targets = blend(jax.random.fold_in(key, _BLENDING), images, own)
  images, replaced = mix(key, images, labels, codes, rate, return_mask=True)
  targets = jnp.where(replaced[:, None], own, targets)
  return images, targets, jnp.argmax(targets, axis=-1)


def _in_parts(
  gradient_of: Callable[..., tuple[PyTree, tuple[Metrics, PyTree]]],
  state: TrainState,
  batch: tuple[jax.Array, jax.Array, jax.Array],
  count: int,
) -> tuple[PyTree, Metrics, PyTree]:
  """Return the mean gradient and metrics of `count` parts of a batch, and the last model state."""
  # Part i takes each count-th example from i on: on a mesh, every device keeps its own.
  parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), batch)

  def add(carry: Any, index: jax.Array) -> tuple[Any, Metrics]:
    total, model_state = carry
    gradient, (metrics, model_state) = gradient_of(
      state.params, model_state, *jax.tree.map(lambda x: x[:, index], parts)
    )
    return (jax.tree.map(jnp.add, total, gradient), model_state), metrics

  start = jax.tree.map(jnp.zeros_like, state.params), state.model_state
  (total, model_state), metrics = jax.lax.scan(add, start, jnp.arange(count))
  mean = jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)
  return mean, jax.tree.map(jnp.mean, metrics), model_state


def epoch_rows(key: jax.Array, epoch: Any, num_examples: int, batch_size: int) -> jax.Array:
  """Tell which examples each step of an epoch sees: one permutation, cut into batches.

  The num_examples mod batch_size rows left over sit this epoch out.

  Args:
    key: of the train state.
    epoch: from 0; may be traced.
    num_examples, batch_size: batch_size at least 1 and at most num_examples.

  Returns:
    (steps, batch_size) int rows of the data set.

  Raises:
    ValueError: a batch size outside that range.
  """
  batch_size = _checks.require_size("batch_size", batch_size)
  steps = num_examples // batch_size
  if not steps:
    raise ValueError(
      f"batch_size: got {batch_size} for {num_examples} examples; expected at most that many."
    )
  order_key = jax.random.fold_in(jax.random.split(key)[1], epoch)
  order = jax.random.permutation(order_key, num_examples)
  return order[: steps * batch_size].reshape(steps, batch_size)


def make_batch_step(
  step: Step,
  preprocess: Callable[[jax.Array], jax.Array],
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> BatchStep:
  """Make the function that does one step on a batch of stored images: augment, preprocess, step.

  Args:
    step: as `make_train_step` returns it.
    preprocess: maps stored images (uint8, say) to the space that the model sees.
    augment: (keys (B,), stored images (B, *shape)) -> images. The key of an example depends on the
      state's key, the epoch and the example's row alone, whatever the batch it is in.

  Returns:
    batch_step(state, images (B, *shape), labels (B,), codes, rows (B,), epoch) -> (state, metrics),
    traceable; `rows` are the examples' places in the data set.
  """

  def batch_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    codes: jax.Array,
    rows: jax.Array,
    epoch: Any,
  ) -> tuple[TrainState, Metrics]:
    if augment is not None:
      epoch_key = jax.random.fold_in(jax.random.fold_in(state.key, _AUGMENTATION), epoch)
      images = augment(jax.vmap(lambda row: jax.random.fold_in(epoch_key, row))(rows), images)
    return step(state, preprocess(images), labels, codes)

  return batch_step


def make_epoch(batch_step: BatchStep, *, batch_size: int) -> Step:
  """Make one jitted call that runs every step of an epoch on a data set that lies on the device.

  Epoch e (= step // steps per epoch) visits the examples as `epoch_rows` says. On CPU this pays off
  for dense models only: convolutions inside `lax.scan` are many times slower there.

  Args:
    batch_step: as `make_batch_step` returns it.
    batch_size: at least 1 and at most the number of examples.

  Returns:
    epoch(state, all images, all labels, codes) -> (state, mean metrics). The state's step must be a
    multiple of the steps per epoch. The state given is donated: use the one returned.

  Raises:
    ValueError: a batch size below one, or (when called) above the number of examples.
  """
  batch_size = _checks.require_size("batch_size", batch_size)

  def epoch(
    state: TrainState, images: jax.Array, labels: jax.Array, codes: jax.Array
  ) -> tuple[TrainState, Metrics]:
    number = state.step // max(len(images) // batch_size, 1)

    def one(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
      return batch_step(state, images[rows], labels[rows], codes, rows, number)

    all_rows = epoch_rows(state.key, number, len(images), batch_size)
    state, metrics = jax.lax.scan(one, state, all_rows)
    return state, jax.tree.map(jnp.mean, metrics)

  return jax.jit(epoch, donate_argnums=0)
