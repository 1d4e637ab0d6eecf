"""The protocol of methods: toys of each kind and every real method pass the same tests."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_trees_close, cpu_mesh, host, make_codes, make_params, mlp, place

import mnemonic_jax as mj
from mnemonic_jax.methods import METHODS, name_of, settings
from mnemonic_jax.methods.protocol import method

pytestmark = pytest.mark.filterwarnings("ignore:The model classifies")


@method
@dataclasses.dataclass(frozen=True)
class EditTwice:
  """Edits, looks at what came out, and edits again."""

  rate: Any = 0.1

  def step(self, problem):
    params = problem.params
    for _ in range(2):
      gap = problem.scores(params).loss_gap
      toward = jnp.mean(jnp.where(problem.forget[None], problem.logits(params), 0), dtype=float)
      shift = self.rate * (jnp.tanh(gap) + jnp.tanh(toward))
      params = jax.tree.map(lambda leaf: leaf - shift.astype(leaf.dtype), params)  # noqa: B023
    return params, {"gap": gap}


@method
@dataclasses.dataclass(frozen=True)
class TryMany:
  """Tries candidates, and keeps the one with the best scores."""

  count: int = dataclasses.field(default=4, metadata={"static": True})
  largest: Any = 1.0

  def step(self, problem):
    rates = jnp.linspace(0.2, 1.0, self.count) * self.largest
    fishers = problem.fishers()
    towards = lambda leaf, fisher, rate: leaf - rate * fisher[0] / (fisher.sum(0) + 1e-30)
    moved = lambda rate: jax.tree.map(
      lambda leaf, fisher: towards(leaf, fisher, rate).astype(leaf.dtype), problem.params, fishers
    )
    scores = problem.map(lambda rate: problem.scores(moved(rate)), rates)
    best = rates[jnp.argmax(scores.retain_accuracy + scores.forget_error)]
    return moved(best), {"rate": best}


class DescentState(NamedTuple):
  done: jax.Array
  params: Any
  momentum: Any


@method
@dataclasses.dataclass(frozen=True)
class Descent:
  """Takes many steps from Python."""

  rate: Any = 0.05
  steps: int = dataclasses.field(default=5, metadata={"static": True})

  def init(self, problem):
    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    return DescentState(jnp.int32(0), problem.params, zeros)

  def advance(self, problem, state):
    gradient = jax.grad(lambda params: problem.scores(params).loss_gap)(state.params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m - g, state.momentum, gradient)
    params = jax.tree.map(lambda leaf, m: leaf - self.rate * m, state.params, momentum)
    return DescentState(state.done + 1, params, momentum)

  def finish(self, problem, state):
    return state.params, {"steps": state.done}


REAL = {
  "projection": mj.Projection(depth=1),
  "drop_row": mj.DropRow(),
  "dampening": mj.Dampening(0.9),
  "perturbation": mj.Perturbation(0.1, 2.0),
}
ONE_SHOT = {"edit_twice": EditTwice(), "try_many": TryMany(), **REAL}
ALL = {**ONE_SHOT, "descent": Descent()}
PARAMS, CODES = make_params("mlp"), make_codes()


def sides(*classes):
  forget = np.isin(np.arange(4), classes)
  return jnp.asarray(forget), jnp.asarray(~forget)


def test_every_method_of_the_library_is_tested_here():
  """Relearn, which takes many steps, has its own: test_healing.py."""
  assert REAL.keys() | {"relearn"} == METHODS.keys()
  assert all(name_of(cls) == name for name, cls in METHODS.items())
  assert all(type(method) is METHODS[name] for name, method in REAL.items())


@pytest.mark.parametrize("name", ALL)
def test_a_method_is_a_frozen_pytree_of_its_settings(name):
  made = ALL[name]
  leaves, treedef = jax.tree.flatten(made)
  assert jax.tree.unflatten(treedef, leaves) == made and hash(treedef)
  assert all(isinstance(leaf, (int, float)) for leaf in leaves)
  fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
  assert settings(made) == fields and json.loads(json.dumps(fields)) is not None
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.depth = 1


@pytest.mark.parametrize("name", ALL)
def test_only_weights_change(name):
  params = PARAMS | {"half": jnp.ones(5, jnp.bfloat16)}
  model = lambda p, x: mlp(p, x * p["half"].astype(jnp.float32)[None])
  before = host(params)
  result = mj.forget(model, params, CODES, [0], method=ALL[name])
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
  assert jax.tree.all(jax.tree.map(same, result.params, params))
  assert not jax.tree.all(jax.tree.map(np.array_equal, host(result.params), before))
  assert jax.tree.all(jax.tree.map(np.array_equal, host(params), before))
  assert type(result.method) is type(ALL[name]) and isinstance(result.code_forget_error, float)
  assert all(isinstance(value, (int, float, np.ndarray)) for value in result.info.values())


@pytest.mark.parametrize("name", ALL)
def test_a_sharded_model_forgets_the_same_and_stays_where_it_is(name):
  params, codes = make_params("mlp", features=8, hidden=8), make_codes(features=8)
  single = mj.forget(mlp, params, codes, [1], method=ALL[name])
  mesh = cpu_mesh(4)
  placed = {leaf: place(value, mesh, "data") for leaf, value in params.items()}
  result = mj.forget(mlp, placed, codes, [1], method=ALL[name])
  assert_trees_close(result.params, host(single.params), rtol=1e-4, atol=1e-5)
  assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, result.params, placed))


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_traced_step_equals_a_forget_and_maps_over_classes(name):
  step = lambda forget: mj.forget_step(mlp, PARAMS, CODES, forget, ~forget, ONE_SHOT[name])
  table, info = jax.jit(jax.vmap(step))(jnp.eye(4, dtype=bool))
  for c in range(4):
    one = mj.forget(mlp, PARAMS, CODES, [c], method=ONE_SHOT[name])
    row = jax.tree.map(lambda leaf, c=c: leaf[c], (table, info))
    assert_trees_close(row[0], host(one.params), rtol=1e-4, atol=1e-5)
    assert float(row[1].code_forget_error) == pytest.approx(one.code_forget_error)
    assert row[1].info.keys() == one.info.keys()


@pytest.mark.parametrize("name", ALL)
def test_another_class_calls_the_model_no_more(name):
  calls = []

  def logits(params, inputs):
    calls.append(1)
    return mlp(params, inputs)

  mj.forget(logits, PARAMS, CODES, [0], method=ALL[name])
  assert calls
  calls.clear()
  other = jax.tree.map(lambda number: number * 0.5, ALL[name])
  mj.forget(logits, PARAMS, CODES, [2, 3], method=other)
  assert not calls


def test_many_steps_call_progress_and_go_on_from_a_state_bit_for_bit():
  made, seen = Descent(), []
  whole = mj.forget(
    mlp, PARAMS, CODES, [0], method=made, progress=lambda done, of: seen.append((done, of))
  )
  assert seen == [(done, 5) for done in range(1, 6)]
  stopped = []

  def stop_after_two(state):
    stopped.append(jax.tree.map(np.array, state))
    if state.done == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    mj.forget(mlp, PARAMS, CODES, [0], method=made, on_state=stop_after_two)
  rest = mj.forget(mlp, PARAMS, CODES, [0], method=made, state=stopped[-1])
  assert rest.info == {"steps": 5}
  assert jax.tree.all(jax.tree.map(np.array_equal, host(rest.params), host(whole.params)))


def test_a_traced_step_refuses_a_method_that_takes_many_steps():
  with pytest.raises(ValueError, match=r"method: Descent takes 5 steps.*mnemonic_jax.forget"):
    mj.forget_step(mlp, PARAMS, CODES, *sides(0), Descent())


def test_a_state_without_steps_is_refused():
  with pytest.raises(ValueError, match=r"state: EditTwice takes one step"):
    mj.forget(mlp, PARAMS, CODES, [0], method=EditTwice(), state={})


def test_a_state_of_another_model_is_refused():
  state = DescentState(jnp.int32(2), {"kernel": jnp.ones(3)}, {"kernel": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"state: .*expected a state that Descent made"):
    mj.forget(mlp, PARAMS, CODES, [0], method=Descent(), state=state)


def test_a_method_that_changes_more_than_weights_is_refused():
  @method
  @dataclasses.dataclass(frozen=True)
  class Widen:
    def step(self, problem):
      return jax.tree.map(lambda leaf: leaf[None], problem.params), {}

  expected = r"method: Widen returned other params .*bias1.*\(1, 6\).*expected .*\(6,\)"
  with pytest.raises(ValueError, match=expected):
    mj.forget(mlp, PARAMS, CODES, [0], method=Widen())
  with pytest.raises(ValueError, match=expected):
    mj.forget_step(mlp, PARAMS, CODES, *sides(0), Widen())
