"""The table of each leaf's way: it must match what the engine does, and what it costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnemonic_jax as mj
from mnemonic_jax.fisher import sums, tied

X = jax.ShapeDtypeStruct((6, 5, 4), jnp.float32)  # examples, positions, features
Y = jax.ShapeDtypeStruct((6,), jnp.int32)


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def explain(loss, params, x=X, y=Y, **options):
  return {row.path: row for row in mj.explain_fisher(loss, params, x, y, **options).leaves}


def test_a_product_over_positions_is_contracted_and_holds_one_gradient():
  row = explain(lambda p, x, y: (x @ p["w"]).sum((1, 2)), {"w": shaped(4, 3)})["['w']"]
  assert row == ("['w']", (4, 3), "product", "", 2 * 12 * (5 + 1), 12 * 4, 0)


def test_a_product_at_one_position_holds_no_gradient_but_one_side_of_it_weighed():
  row = explain(lambda p, x, y: (x[:, 0] @ p).sum(1), shaped(4, 3))[""]
  assert (row.rule, row.flops, row.bytes, row.bytes_per_example) == (
    "product",
    2 * 12 * 2,
    0,
    3 * 4,
  )


def test_a_convolution():
  loss = lambda p, x, y: jax.lax.conv_general_dilated(
    x, p, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
  ).sum((1, 2))
  row = explain(loss, shaped(3, 4, 2))[""]
  assert (row.rule, row.flops, row.bytes) == ("convolution", 2 * 24 * (5 + 1), (24 + 5 * 3 * 4) * 4)


def test_a_lookup():
  ids = shaped(6, 7, dtype=jnp.int32)
  row = explain(lambda p, x, y: p[x].sum((1, 2)), shaped(50, 3), ids)[""]
  assert (row.rule, row.bytes, row.bytes_per_example) == ("lookup", 3 * 7 * 3 * 4, 0)


@pytest.mark.parametrize(
  ("loss", "reason"),
  [
    (lambda p, x, y: (x + p[None, None]).sum((1, 2)), "used in add"),
    (lambda p, x, y: (x * p[None, None]).sum((1, 2)), "used in mul"),
    (
      lambda p, x, y: (x @ p + jax.checkpoint(lambda q: x @ q)(p)).sum(1),
      "used more than once",
    ),
    (lambda p, x, y: (x @ (p / jnp.sqrt((p**2).sum()))).sum(1), "used"),
    (
      lambda p, x, y: jax.lax.scan(lambda h, _: (jnp.tanh(h * p[None, None]), None), x, None, 3)[
        0
      ].sum((1, 2)),
      "scan",
    ),
  ],
)
def test_what_is_not_contracted_says_why_and_holds_a_gradient_per_example(loss, reason):
  row = explain(loss, shaped(4))[""]
  assert row.rule == "per example" and reason in row.reason
  assert (row.bytes, row.bytes_per_example) == (0, 4 * 4)


def test_half_precision_is_held_in_float32():
  assert (
    explain(
      lambda p, x, y: (x * p[None, None]).sum((1, 2)),
      shaped(4, dtype=jnp.bfloat16),
      x=shaped(6, 5, 4, dtype=jnp.bfloat16),
    )[""].bytes_per_example
    == 16
  )


def test_scanned_layers_count_every_layer_and_go_their_own_way():
  def loss(p, x, y):
    block = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None, None]), None)
    return jax.lax.scan(jax.checkpoint(block), x, p)[0].sum((1, 2))

  rows = explain(loss, {"w": shaped(3, 4, 4), "b": shaped(3, 4)})
  assert (rows["['w']"].rule, rows["['b']"].rule) == ("product", "per example")
  assert rows["['w']"].flops == 3 * 2 * 16 * (5 + 1)
  assert rows["['w']"].bytes == 16 * 4, "one layer at a time"


def test_a_leaf_in_two_operations_of_one_kind_and_a_leaf_that_is_not_used():
  loss = lambda p, x, y: ((x @ p["qk"][:, :3]) * (x @ p["qk"][:, 3:])).sum((1, 2))
  rows = explain(loss, {"qk": shaped(4, 6), "idle": shaped(2)})
  assert (rows["['qk']"].rule, rows["['qk']"].reason) == ("product", "")
  assert (rows["['idle']"].rule, rows["['idle']"].reason) == ("unused", "does not reach the loss")


def test_masked_leaves_are_not_in_the_table():
  assert list(
    explain(
      lambda p, x, y: (x @ p["a"] @ p["b"]).sum((1, 2)),
      {"a": shaped(4, 4), "b": shaped(4, 2)},
      mask={"a": True, "b": False},
    )
  ) == ["['a']"]


def test_it_prints_as_a_table():
  text = str(
    mj.explain_fisher(
      lambda p, x, y: (x @ p["w"] + p["b"][None, None]).sum((1, 2)),
      {"w": shaped(4, 3), "b": shaped(3)},
      X,
      Y,
    )
  )
  head, *rows = text.splitlines()
  assert head.split() == ["leaf", "shape", "rule", "kFLOP/example", "kB", "kB/example", "why"]
  assert rows[0].split()[0] == "['b']" and rows[0].endswith("used in add") and "product" in rows[1]


def test_bad_arguments_are_refused_as_by_the_fisher():
  with pytest.raises(ValueError, match=r"loss_fn: returned shape \(\)"):
    mj.explain_fisher(lambda p, x, y: (x @ p).sum(), shaped(4), X, Y)
  with pytest.raises(TypeError, match="expected floating arrays only"):
    mj.explain_fisher(lambda p, x, y: x.sum((1, 2)), shaped(4, dtype=jnp.int32), X, Y)


def test_the_table_is_what_the_engine_does(monkeypatch):
  """Every contraction and every copy that the engine makes is in the table, and no other."""
  made = []

  def noting(name, function):
    return lambda *args: (made.append(name), function(*args))[1]

  monkeypatch.setattr(sums, "copies", noting("per example", sums.copies))
  monkeypatch.setattr(sums, "tap", noting("contracted", sums.tap))
  monkeypatch.setattr(tied, "first", noting("contracted", tied.first))

  def loss(p, x, y):
    hidden = jnp.tanh(x @ p["w"] + p["b"][None, None])
    hidden = jax.checkpoint(lambda v: jnp.tanh(v @ p["tied"]) @ p["tied"].T)(hidden)
    return (hidden @ p["head"]).sum((1, 2))

  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=size), jnp.float32)
    for name, size in [("w", (4, 3)), ("b", 3), ("tied", (3, 2)), ("head", (3, 2))]
  }
  x, y = jnp.asarray(rng.normal(size=X.shape), jnp.float32), jnp.zeros(6, jnp.int32)
  rows = explain(loss, params, x, y)
  mj.diagonal_fisher(loss, params, x, y)
  per_example = [row for row in rows.values() if row.rule == "per example"]
  assert (
    (made.count("per example"), made.count("contracted"))
    == (len(per_example), len(rows) - len(per_example))
    == (1, 3)
  )
