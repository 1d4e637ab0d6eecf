"""The Fisher of any model is that of a float64 loop over single examples with plain `jax.grad`."""

from __future__ import annotations

from functools import cache, partial

import exact_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import mnemonic_jax as mj
from mnemonic_jax.fisher import jaxprs

# Groups that share examples, one example in none; groups that do not, out of order.
OVERLAPPING = np.array([[0.5, 1.5, 0.0, 0.0, 2.0], [1.0, 0.3, 0.0, 0.7, 0.0]], np.float32)
DISJOINT = np.array([[0.0, 1.5, 0.0, 0.4, 0.0], [1.0, 0.0, 0.0, 0.0, 0.7]], np.float32)


@pytest.fixture(autouse=True)
def no_nan():
  with jax.debug_nans(True):
    yield


def as_jax(tree, dtype):
  """Arrays of `dtype` where they are floating."""
  return jax.tree.map(
    lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None), tree
  )


def one_gradient(loss_fn):
  """(params, input, label of one example) -> its gradient."""
  return jax.grad(lambda params, x, y: loss_fn(params, *jax.tree.map(lambda z: z[None], (x, y)))[0])


def squares_by_loop(loss_fn, *arrays):
  """Each example's squared gradient in float64, one (N, *leaf.shape) per leaf."""
  with jax.enable_x64(True):
    params, inputs, labels = as_jax(arrays, jnp.float64)
    gradient = jax.jit(one_gradient(loss_fn))
    gradients = [
      jax.tree.leaves(gradient(params, *jax.tree.map(lambda x, n=n: x[n], (inputs, labels))))
      for n in range(len(jax.tree.leaves(labels)[0]))
    ]
    return [
      np.square(np.stack([np.asarray(x, np.float64) for x in leaf]))
      for leaf in zip(*gradients, strict=True)
    ]


@cache
def prepared(name):
  """(loss, (params, inputs, labels), squared gradients of each example) of a case."""
  loss_fn, *arrays = CASES[name].make()
  return loss_fn, arrays, squares_by_loop(loss_fn, *arrays)


def error(ours, squares, weights):
  """The largest difference, relative to the largest entry of its leaf and group.

  A gradient that is zero but for rounding (of a key's bias in attention, say) is measured against
  the other leaves.
  """
  worst = 0.0
  leaves = jax.tree.leaves(ours)
  assert len(leaves) == len(squares)
  wanted = [np.einsum("gn,n...->g...", weights.astype(np.float64), square) for square in squares]
  largest_of_all = max(np.max(leaf, initial=0) for leaf in wanted)
  for leaf, wanted_leaf in zip(leaves, wanted, strict=True):
    assert leaf.shape == wanted_leaf.shape
    assert np.all(np.isfinite(wanted_leaf))
    for group, wanted_group in zip(np.asarray(leaf, np.float64), wanted_leaf, strict=True):
      difference, largest = (
        np.max(abs(group - wanted_group), initial=0),
        np.max(wanted_group, initial=0),
      )
      if largest < 1e-30 * largest_of_all:
        largest = 1e-8 * largest_of_all
      if difference != 0:
        worst = max(worst, difference / largest if largest and np.isfinite(difference) else np.inf)
  return worst


def error_of_plain_gradients(loss_fn, arrays, squares, weights):
  """The error of float32 gradients of each example, from vmap."""
  params, inputs, labels = as_jax(arrays, jnp.float32)
  gradients = jax.jit(jax.vmap(one_gradient(loss_fn), (None, 0, 0)))(params, inputs, labels)
  summed = lambda x: np.einsum("gn,n...->g...", weights, np.square(np.asarray(x, np.float32)))
  return error(jax.tree.map(summed, gradients), squares, weights)


def check(ours, name, weights, squares=None):
  """Against the squares of each example's gradient; by default those of the case alone."""
  found = error(ours, squares or prepared(name)[2], weights)
  if found > CASES[name].tolerance:
    loss_fn, arrays, squares = prepared(name)
    plain = error_of_plain_gradients(loss_fn, arrays, squares, weights)
    assert found <= min(3 * plain, 1e-3), (
      f"error {found:.1e} of the largest entry; plain gradients: {plain:.1e}"
    )


TOGETHER = 8  # models in one program, which compiles sooner than as many programs


@cache
def computed_together(names):
  """The Fisher and the squares of each case, as the parts of one model whose losses add up.

  No param is in two parts, so each part has the gradients that it has alone.
  """
  made = {name: CASES[name].make() for name in names}
  arrays = [{name: made[name][i] for name in names} for i in (1, 2, 3)]
  loss_fn = lambda *arrays: sum(
    made[name][0](*(array[name] for array in arrays)).astype(float) for name in names
  )
  squares = squares_by_loop(loss_fn, *arrays)
  fisher = jax.jit(lambda *arguments: mj.diagonal_fisher(loss_fn, *arguments))
  found = fisher(*as_jax(arrays, jnp.float32), OVERLAPPING)
  return found, jax.tree.unflatten(jax.tree.structure(arrays[0]), squares)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
  at = list(CASES).index(name) // TOGETHER * TOGETHER
  found, squares = computed_together(tuple(CASES)[at : at + TOGETHER])
  check(found[name], name, OVERLAPPING, jax.tree.leaves(squares[name]))


WITH_X64 = [name for name, case in CASES.items() if case.x64]


# Every tenth case in the suite, the others where there is time.
@pytest.mark.parametrize(
  "name",
  [
    name if i % 10 == 0 else pytest.param(name, marks=pytest.mark.long)
    for i, name in enumerate(WITH_X64)
  ],
)
def test_float64(name):
  loss_fn, arrays, squares = prepared(name)
  with jax.enable_x64(True):
    fisher = jax.jit(lambda *arguments: mj.diagonal_fisher(loss_fn, *arguments))
    ours = fisher(*as_jax(arrays, jnp.float64), OVERLAPPING.astype(np.float64))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(ours))
  assert error(ours, squares, OVERLAPPING) <= 1e-10


def test_a_scan_with_settings_unknown_to_the_engine_goes_per_example(monkeypatch):
  known = {"scan": jaxprs._KNOWN["scan"] - {"unroll"}, "cond": jaxprs._KNOWN["cond"]}
  monkeypatch.setattr(jaxprs, "_KNOWN", known)
  name = "scan_over_layers_rematerialised"
  loss_fn, arrays, _ = prepared(name)
  again = lambda *arguments: loss_fn(*arguments)  # nothing is kept of the plan for this function
  plan = mj.explain_fisher(again, *as_jax(arrays, jnp.float32))
  assert {(row.rule, row.reason) for row in plan.leaves} == {
    ("per example", "used in a scan with unusual settings")
  }
  fisher = jax.jit(lambda *arguments: mj.diagonal_fisher(again, *arguments))
  check(fisher(*as_jax(arrays, jnp.float32), OVERLAPPING), name, OVERLAPPING)


LOOKUPS = {  # one lookup, however it is written and batched
  "lookup_under_vmap_twice": (40, 3),
  "lookup_of_one_number": (3, 4),
  "lookup_by_a_dynamic_slice": (6, 4),
  "lookup_of_equinox": (9, 3),
  "lookup_negative": (5, 2),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_in_any_batching_is_no_gradient_per_example(name):
  loss_fn, *arrays = CASES[name].make()
  (row,) = mj.explain_fisher(loss_fn, *as_jax(arrays, jnp.float32)).leaves
  assert (row.rule, row.shape, row.bytes_per_example) == ("lookup", LOOKUPS[name], 0)


def test_forget_where_a_branch_is_for_another_platform():
  """The branch for TPUs has no meaning here: neither Fisher nor candidates may lower it."""
  draw = exact_cases.Draw("platforms")
  params, codes = {"w": draw(4, 6), "v": draw(6, 3)}, draw(3, 2, 4)
  kernel = lambda x, w: exact_cases.on_tpu_only.bind(x @ w)
  plain = lambda x, w: x @ w
  hidden = lambda x, w: jax.lax.platform_dependent(x, w, tpu=kernel, default=plain)
  models = [lambda p, x, h=h: jnp.tanh(h(x, p["w"])) @ p["v"] for h in (hidden, plain)]
  params, codes = as_jax((params, codes), jnp.float32)
  method = mj.Perturbation(0.1, 1.0)
  found, wanted = (mj.forget(model, params, codes, [1], method=method) for model in models)
  assert np.max(abs(wanted.params["w"] - params["w"])) > 1e-3
  for name in params:
    np.testing.assert_allclose(found.params[name], wanted.params[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "name", [pytest.param("conv_groups", marks=pytest.mark.long), "lookup_repeated_in_an_example"]
)
def test_with_jit_disabled(name):
  loss_fn, arrays, _ = prepared(name)
  with jax.disable_jit():
    ours = mj.diagonal_fisher(loss_fn, *as_jax(arrays, jnp.float32), OVERLAPPING)
  check(ours, name, OVERLAPPING)


def test_leaves_of_two_dtypes_side_by_side():
  rng = np.random.default_rng(0)
  inputs, a, b = (
    rng.normal(size=(3, 4)),
    rng.normal(size=(2, 3)),
    rng.normal(size=(2, 3)).astype(np.float32),
  )
  loss = lambda p, x, y: jnp.square(x @ jnp.concatenate([p["a"], p["b"].astype(p["a"].dtype)])).sum(
    -1
  )
  mixed = lambda p, x, y: jnp.square(x @ jnp.concatenate([p["a"], p["b"]])).sum(-1)
  with jax.enable_x64(True):
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    for loss_fn in (loss, mixed):
      ours = mj.diagonal_fisher(loss_fn, params, jnp.asarray(inputs), jnp.zeros(3))
      assert ours["a"].dtype == jnp.float64 and ours["b"].dtype == jnp.float32
      gradients = jax.vmap(one_gradient(loss_fn), (None, 0, 0))(
        params, jnp.asarray(inputs), jnp.zeros(3)
      )
      for name, tolerance in (("a", 1e-12), ("b", 1e-5)):
        np.testing.assert_allclose(
          ours[name], jnp.mean(jnp.square(gradients[name]), 0), rtol=tolerance
        )


CONCRETE = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.concrete])


@CONCRETE
@pytest.mark.parametrize("weights", [OVERLAPPING, DISJOINT], ids=["overlapping", "disjoint"])
def test_concrete_calls(name, weights):
  loss_fn, arrays, _ = prepared(name)
  check(mj.diagonal_fisher(loss_fn, *as_jax(arrays, jnp.float32), weights), name, weights)


@pytest.mark.parametrize(
  ("name", "microbatch"),
  [*((name, 3) for name, case in CASES.items() if case.concrete), ("inputs_in_a_tree", 1)],
)
def test_microbatch_changes_rounding_only(name, microbatch):
  loss_fn, arrays, _ = prepared(name)
  fisher = partial(mj.diagonal_fisher, loss_fn, *as_jax(arrays, jnp.float32), OVERLAPPING)
  ours, whole = fisher(execution=mj.Execution(microbatch=microbatch)), fisher()
  check(ours, name, OVERLAPPING)
  for leaf, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-6 * np.max(wanted, initial=0))


@pytest.mark.parametrize("sizes", [None, (3, 280, 5), (150, 0, 140), (2, 1, 0)], ids=str)
def test_many_examples(sizes):
  """More than the engine takes at once, some in no group; every param meets data in one position.

  Groups that share examples, and groups of some sizes that share none: one that holds nearly all
  goes another way.
  """
  many, draw = 300, exact_cases.Draw("many")

  def model(p, x):
    h = jnp.tanh(exact_cases.convolve(x, p["kernel"])[:, 0, 0])
    wide = jnp.sin(h @ p["w"] + p["b"]) @ p["wide"]  # which is large enough for a way of its own
    return wide[:, :3] + jnp.cos(wide[:, 3:6]) + jnp.einsum("ne,ef->nef", h, p["experts"]).sum(1)

  params = {
    "kernel": draw(2, 3, 2, 4),
    "w": draw(4, 64),
    "b": draw(64),
    "wide": draw(64, 700),
    "experts": draw(4, 3),
  }
  loss_fn, arrays = exact_cases.scored(model), (params, draw(many, 2, 3, 2), draw.ints(3, many))
  if sizes is None:
    weights = abs(draw(3, many)) * draw.ints(2, 3, many)
  else:
    group = np.random.default_rng(0).permutation(
      np.repeat(np.arange(4), (*sizes, many - sum(sizes)))
    )
    weights = (0.1 + abs(draw(3, many))) * (group == np.arange(3)[:, None])
  squares = squares_by_loop(loss_fn, *arrays)
  fisher = lambda *arrays: mj.diagonal_fisher(loss_fn, *arrays, weights)
  assert error(jax.jit(fisher)(*as_jax(arrays, jnp.float32)), squares, weights) < 1e-5


LINEAR = {  # models that are linear in their param: (function, shape of the param, of an input)
  "dense over tokens": (lambda w, x: x @ w, (4, 3), (5, 4)),
  "broadcast": (lambda w, x: x * w, (4,), (3, 4)),
  "used twice": (lambda w, x: x @ w + jnp.sin(x) @ w, (4, 3), (5, 4)),
}


@pytest.mark.parametrize(
  ("name", "microbatch"), [*((name, None) for name in LINEAR), ("dense over tokens", 3)]
)
def test_classes_not_sums(name, microbatch):
  """Two classes, each with every input and its negative.

  The gradients of a class cancel, and their squares add up.
  """
  model, param_shape, input_shape = LINEAR[name]
  draw = exact_cases.Draw(name)
  half, param = draw(4, *input_shape), jnp.asarray(draw(*param_shape))
  inputs, labels = jnp.concatenate([half, -half]), jnp.array([0, 0, 1, 1] * 2)
  weights = np.equal.outer([0, 1], labels).astype(np.float32)
  loss_fn = lambda p, x, y: (1.0 + y) * jax.vmap(lambda x: jnp.sum(model(p, x)))(x)
  execution = mj.Execution(microbatch)
  ours = mj.diagonal_fisher(loss_fn, param, inputs, labels, weights, execution=execution)

  gradients = np.stack(
    [
      jax.grad(lambda p, n=n: loss_fn(p, inputs[n : n + 1], labels[n : n + 1])[0])(param)
      for n in range(8)
    ]
  )
  of_classes = np.einsum("gn,n...->g...", weights, gradients.astype(np.float64))
  squares = np.einsum("gn,n...->g...", weights, np.square(gradients.astype(np.float64)))
  assert np.max(abs(of_classes)) < 1e-4 * np.max(abs(gradients))
  assert np.min(squares) > 1e-3 * np.max(squares)
  np.testing.assert_allclose(ours, squares, rtol=1e-4)
  assert np.max(abs(ours[0] - ours[1])) > 0.1 * np.max(squares)


@settings(deadline=None, max_examples=6)
@given(
  program=st.lists(
    st.tuples(st.sampled_from(sorted(exact_cases.OPERATIONS)), st.integers(2, 4)),
    min_size=1,
    max_size=6,
  ),
  tokens=st.integers(1, 3),
  width=st.integers(2, 4),
  seed=st.integers(0, 99),
)
def test_random_graphs(program, tokens, width, seed):
  loss_fn, *arrays = exact_cases.graph(program, tokens, width, seed)
  squares = squares_by_loop(loss_fn, *arrays)
  with jax.enable_x64(True):
    fisher = jax.jit(lambda *arguments: mj.diagonal_fisher(loss_fn, *arguments))
    ours = fisher(*as_jax(arrays, jnp.float64), OVERLAPPING.astype(np.float64))
  assert error(ours, squares, OVERLAPPING) <= 1e-10
