"""Training: one step against the reference, and the epoch that runs many in one call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from toys import (
  assert_trees_close,
  cpu_mesh,
  host,
  make_batch,
  make_codes,
  make_params,
  place,
  regression,
)

import mnemonic_jax as mj
from mnemonic_jax import training


def apply(params, model_state, inputs, train):
  return regression(params, inputs), model_state


def make_state(optimizer, seed=0, model_state=None):
  return mj.init_train_state(
    make_params("regression"), model_state or {}, optimizer, jax.random.key(seed)
  )


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_one_step_matches_the_reference(rate):
  optimizer, codes, (images, labels) = optax.sgd(0.3), make_codes(), make_batch()
  state = make_state(optimizer)
  step = jax.jit(mj.make_train_step(apply, optimizer, rate=rate))
  after, metrics = step(state, images, labels, codes)
  mixed = np.asarray(
    mj.mix(jax.random.fold_in(state.key, 0), images, labels, codes, rate), np.float64
  )

  params = host(state.params)
  gradients = [
    reference.regression_gradient(params, x, int(y)) for x, y in zip(mixed, labels, strict=True)
  ]
  wanted = {k: params[k] - 0.3 * np.mean([g[k] for g in gradients], 0) for k in params}
  assert_trees_close(after.params, wanted, rtol=1e-4, atol=1e-6)
  outputs = [reference.regression_logits(params, x) for x in mixed]
  losses = [reference.cross_entropy(o, int(y)) for o, y in zip(outputs, labels, strict=True)]
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["accuracy"], np.mean([np.argmax(o) for o in outputs] == np.asarray(labels)), rtol=1e-6
  )
  assert after.step == 1 and after.key is not None


def test_every_step_mixes_anew_and_the_same_state_the_same():
  optimizer, (images, labels) = optax.sgd(0.0), make_batch(examples=64)
  step, codes = jax.jit(mj.make_train_step(apply, optimizer, rate=0.5)), make_codes()
  state, first = step(make_state(optimizer), images, labels, codes)
  _, second = step(state, images, labels, codes)  # lr 0: only the mixing can differ
  assert first["loss"] != second["loss"]
  _, again = step(make_state(optimizer), images, labels, codes)
  assert again["loss"] == first["loss"]
  _, other_key = step(make_state(optimizer, seed=1), images, labels, codes)
  assert other_key["loss"] != first["loss"]


def test_other_codes_are_another_argument_and_no_other_program():
  optimizer, (images, labels) = optax.sgd(0.1), make_batch(examples=64)
  traces = []

  def counting(params, model_state, inputs, train):
    traces.append(1)
    return apply(params, model_state, inputs, train)

  step = jax.jit(mj.make_train_step(counting, optimizer, rate=0.5))
  _, first = step(make_state(optimizer), images, labels, make_codes())
  once = len(traces)
  _, other = step(make_state(optimizer), images, labels, 1 - make_codes())
  assert len(traces) == once and other["loss"] != first["loss"]


def test_optimizer_and_model_state_are_carried():
  def counting(params, model_state, inputs, train):
    assert train is True
    return regression(params, inputs), {"calls": model_state["calls"] + 1}

  optimizer, (images, labels) = optax.sgd(0.1, momentum=0.9), make_batch()
  step = jax.jit(mj.make_train_step(counting, optimizer, rate=0.0))
  state = make_state(optimizer, model_state={"calls": jnp.int32(0)})
  params, trace = host(state.params), jax.tree.map(np.zeros_like, host(state.params))
  for _ in range(3):
    state, _ = step(state, images, labels, make_codes())
    rows = [
      reference.regression_gradient(params, np.asarray(x, float), int(y))
      for x, y in zip(images, labels, strict=True)
    ]
    trace = {k: 0.9 * trace[k] + np.mean([g[k] for g in rows], 0) for k in params}
    params = {k: params[k] - 0.1 * trace[k] for k in params}
  assert state.model_state["calls"] == 3 and state.step == 3
  assert_trees_close(state.params, params, rtol=1e-4, atol=1e-6)


def test_a_callers_loss_is_used():
  optimizer, (images, labels) = optax.sgd(1.0), make_batch()
  step = mj.make_train_step(
    apply, optimizer, rate=0.0, loss=lambda logits, labels: 0 * logits[:, 0] + 7
  )
  state, metrics = step(make_state(optimizer), images, labels, make_codes())
  assert metrics["loss"] == pytest.approx(7)
  assert_trees_close(state.params, host(make_params("regression")), rtol=0)


def recording_step(state, images, labels, codes):
  """A step that learns nothing and remembers in params which rows it saw at which step."""
  seen = state.params.at[state.step % len(state.params)].set(images[:, 0])
  return state._replace(params=seen, step=state.step + 1), {
    "loss": images[0, 0],
    "accuracy": labels[0].astype(jnp.float32),
  }


def run_epoch(examples, batch_size, epochs=1, seed=0):
  epoch = training.make_epoch(
    training.make_batch_step(recording_step, lambda x: x * 2), batch_size=batch_size
  )
  steps = examples // batch_size
  state = training.TrainState(
    jnp.zeros((steps, batch_size)), {}, {}, jnp.int32(0), jax.random.key(seed)
  )
  images, labels = jnp.arange(examples, dtype=jnp.float32)[:, None], jnp.arange(examples)
  seen = []
  for _ in range(epochs):
    state, metrics = epoch(state, images, labels, None)
    seen.append(np.asarray(state.params) / 2)
  return seen, state, metrics


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_gradient_in_parts_is_the_same_gradient(parts):
  def counting(params, model_state, inputs, train):
    return regression(params, inputs), {"examples": model_state["examples"] + len(inputs)}

  optimizer, codes, (images, labels) = optax.sgd(0.3), make_codes(), make_batch(examples=8)
  make = lambda accumulate: mj.make_train_step(counting, optimizer, rate=0.5, accumulate=accumulate)
  state = make_state(optimizer, model_state={"examples": jnp.int32(0)})
  whole, metrics = jax.jit(make(1))(state, images, labels, codes)
  ours, our_metrics = jax.jit(make(parts))(state, images, labels, codes)
  assert_trees_close(ours.params, host(whole.params), rtol=1e-5, atol=1e-7)
  assert_trees_close(our_metrics, host(metrics), rtol=1e-5)
  assert ours.model_state["examples"] == 8  # each part went through it


def test_parts_that_do_not_divide_the_batch_are_refused():
  optimizer, (images, labels) = optax.sgd(0.3), make_batch(examples=8)
  step = mj.make_train_step(apply, optimizer, rate=0.5, accumulate=3)
  with pytest.raises(ValueError, match="accumulate: got 3 for a batch of 8; expected a divisor"):
    step(make_state(optimizer), images, labels, make_codes())


def test_an_epoch_visits_every_example_once_and_what_is_left_over_sits_out():
  (seen,), state, _ = run_epoch(12, 4)
  assert sorted(seen.ravel()) == list(range(12)) and state.step == 3
  (seen,), state, metrics = run_epoch(11, 4)
  assert len(set(seen.ravel())) == 8 and state.step == 2
  assert metrics["loss"] == 2 * seen[:, 0].mean() and metrics["accuracy"] == seen[:, 0].mean()


def test_each_epoch_has_its_own_order_and_the_key_decides():
  (first, second), *_ = run_epoch(12, 4, epochs=2)
  assert not np.array_equal(first, second) and not np.array_equal(first.ravel(), np.arange(12))
  (again, _), *_ = run_epoch(12, 4, epochs=2)
  np.testing.assert_array_equal(first, again)
  (other,), *_ = run_epoch(12, 4, seed=1)
  assert not np.array_equal(first, other)


def test_an_epoch_equals_its_steps_one_by_one():
  optimizer, (images, labels) = optax.sgd(0.1, momentum=0.9), make_batch(examples=10)
  step = mj.make_train_step(apply, optimizer, rate=0.3)
  epoch = training.make_epoch(training.make_batch_step(step, lambda x: x), batch_size=3)
  whole, _ = epoch(make_state(optimizer), images, labels, make_codes())

  state = make_state(optimizer)
  order = jax.random.permutation(jax.random.fold_in(jax.random.split(state.key)[1], 0), 10)[
    :9
  ].reshape(3, 3)
  for rows in order:
    state, _ = jax.jit(step)(state, images[rows], labels[rows], make_codes())
  assert_trees_close(whole.params, host(state.params), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_sharded_batch_trains_the_same(devices):
  optimizer, (images, labels) = optax.sgd(0.3), make_batch(examples=16)
  step, codes = jax.jit(mj.make_train_step(apply, optimizer, rate=0.5)), make_codes()
  single, _ = step(make_state(optimizer), images, labels, codes)
  for axis_type in ("Auto", "Explicit") if devices == 4 else ("Auto",):
    mesh = cpu_mesh(devices, axis_type)
    batch = place((images, labels), mesh, "data")
    sharded, _ = step(place(make_state(optimizer), mesh), *batch, place(codes, mesh))
    assert_trees_close(sharded.params, host(single.params), rtol=1e-5, atol=1e-6)


def test_the_augmentation_of_an_example_depends_on_its_row_and_the_epoch_alone():
  seen = []

  def augment(keys, images):
    drawn = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    return jnp.stack([images[:, 0], drawn], axis=1)

  def step(state, images, labels, codes):
    seen.append(np.asarray(images))
    return state._replace(step=state.step + 1), {}

  images, labels = jnp.arange(6.0)[:, None], jnp.arange(6)
  state = training.TrainState({}, {}, {}, jnp.int32(0), jax.random.key(0))
  batch_step = training.make_batch_step(step, lambda x: x, augment)
  for rows, epoch in (([0, 1, 2], 0), ([2, 5, 1], 0), ([0, 1, 2], 1)):
    rows = jnp.array(rows)
    batch_step(state, images[rows], labels[rows], None, rows, epoch)
  by_row = [dict(map(tuple, batch)) for batch in seen]
  assert by_row[0][1] == by_row[1][1] and by_row[0][2] == by_row[1][2]
  assert len({drawn for batch in by_row[:2] for drawn in batch.values()}) == 4
  assert not set(by_row[0].values()) & set(by_row[2].values())


def test_the_rows_of_an_epoch_are_checked():
  with pytest.raises(ValueError, match="batch_size: got 7 for 6 examples"):
    training.epoch_rows(jax.random.key(0), 0, 6, 7)
  with pytest.raises(ValueError, match="batch_size"):
    training.epoch_rows(jax.random.key(0), 0, 6, 0)


def test_the_average_follows_the_params_and_changes_nothing_else():
  plain, (images, labels) = optax.sgd(0.1, momentum=0.9), make_batch()
  averaging = training.with_ema(plain, 0.8)
  states = {
    name: make_state(optimizer) for name, optimizer in (("plain", plain), ("ema", averaging))
  }
  assert training.ema_params(states["plain"]) is None
  wanted = host(states["ema"].params)
  assert_trees_close(training.ema_params(states["ema"]), wanted, rtol=0)
  for _ in range(4):
    for name, optimizer in (("plain", plain), ("ema", averaging)):
      step = jax.jit(mj.make_train_step(apply, optimizer, rate=0.5))
      states[name], _ = step(states[name], images, labels, make_codes())
    wanted = {
      key: 0.8 * wanted[key] + 0.2 * value for key, value in host(states["ema"].params).items()
    }
  assert_trees_close(states["ema"].params, host(states["plain"].params), rtol=0)
  assert_trees_close(training.ema_params(states["ema"]), wanted, rtol=1e-5, atol=1e-6)


def test_a_donated_state_may_hold_an_average():
  optimizer, (images, labels) = training.with_ema(optax.sgd(0.1), 0.5), make_batch(examples=6)
  step = mj.make_train_step(apply, optimizer, rate=0.5)
  epoch = training.make_epoch(training.make_batch_step(step, lambda x: x), batch_size=3)
  state, _ = epoch(make_state(optimizer), images, labels, make_codes())
  assert np.isfinite(training.ema_params(state)["kernel"]).all()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
  with pytest.raises(
    ValueError, match=f"decay: got {decay}; expected a number of at least 0 and below 1"
  ):
    training.with_ema(optax.sgd(0.1), decay)
