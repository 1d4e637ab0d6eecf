"""What a pass holds, from the compiled program: a batch gradient's memory, the sums, and what explain_fisher says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnemonic_jax as mj
from mnemonic_jax.fisher import passes
from mnemonic_jax.methods.request import resolve

GROUPS, EXAMPLES, CLASSES = 2, 16, 10


def shaped(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def transformer(remat):
  """Eight layers of width 64 on 32 tokens, scanned."""

  def loss(p, x, y):
    def layer(h, weights):
      scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", h @ weights["q"], h @ weights["k"]))
      h = h + scores @ (h @ weights["v"])
      return h + jax.nn.gelu(h @ weights["in"] + weights["bias"]) @ weights["out"], None

    h, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, p["layers"])
    return mj.softmax_cross_entropy(h.mean(1) @ p["head"], y)

  layers = {name: shaped(8, 64, 64) for name in "qkv"} | {
    "in": shaped(8, 64, 256),
    "bias": shaped(8, 256),
  }
  return (
    loss,
    {"layers": layers | {"out": shaped(8, 256, 64)}, "head": shaped(64, CLASSES)},
    (32, 64),
  )


def convnet():
  numbers = ("NHWC", "HWIO", "NHWC")

  def loss(p, x, y):
    for kernel in p["kernels"]:
      x = jax.nn.relu(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
      )
    return mj.softmax_cross_entropy(x.mean((1, 2)) @ p["head"], y)

  return (
    loss,
    {"kernels": [shaped(3, 3, 32, 32) for _ in range(6)], "head": shaped(32, CLASSES)},
    (16, 16, 32),
  )


def mlp():
  loss = lambda p, x, y: mj.softmax_cross_entropy(jax.nn.sigmoid(x @ p["a"] + p["b"]) @ p["c"], y)
  return loss, {"a": shaped(784, 1000), "b": shaped(1000), "c": shaped(1000, CLASSES)}, (784,)


def tied():
  loss = lambda p, x, y: mj.softmax_cross_entropy((jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["head"], y)
  return loss, {"w": shaped(64, 512), "head": shaped(64, CLASSES)}, (64,)


MODELS = {
  "transformer": transformer(False),
  "rematerialised transformer": transformer(True),
  "convnet": convnet(),
  "mlp": mlp(),
  "tied": tied(),
}


def temporary(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  "disjoint",
  [pytest.param(False, marks=pytest.mark.long, id="shared"), pytest.param(True, id="disjoint")],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_holds_a_batch_gradient_and_the_sums(name, disjoint):
  loss, params, shape = MODELS[name]
  inputs, labels = shaped(EXAMPLES, *shape), jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)
  batch = temporary(jax.grad(lambda p, x, y: loss(p, x, y).mean()), params, inputs, labels)
  objective = passes.Objective(
    loss, (True,) * len(jax.tree.leaves(params)), "highest", disjoint=disjoint
  )
  run = lambda p, x, y, w: passes.fisher_program(objective, EXAMPLES, p, (x, y), w)
  ours = temporary(run, params, inputs, labels, shaped(GROUPS, EXAMPLES))
  size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
  per_example = sum(
    row.bytes_per_example for row in mj.explain_fisher(loss, params, inputs, labels).leaves
  )
  slack = 2**16  # index arrays and alignment
  assert ours <= batch + 2 * GROUPS * size + EXAMPLES * per_example + slack
  # And this is a bound: per-example gradients of the whole model are beyond it.
  one = jax.vmap(jax.grad(lambda p, x, y: loss(p, x[None], y[None])[0]), (None, 0, 0))
  square = lambda p, x, y, w: jax.tree.map(
    lambda g: jnp.einsum("gn,n...->g...", w, g * g), one(p, x, y)
  )
  if name in ("rematerialised transformer", "mlp"):
    plain = temporary(square, params, inputs, labels, shaped(GROUPS, EXAMPLES))
    assert plain > batch + 2 * GROUPS * size + EXAMPLES * per_example + slack


def test_candidates_are_judged_within_the_budget_of_a_pass(monkeypatch):
  """Also without a convolution, which stands in no loop on CPU; and a few codes at a time are judged as all at once."""
  codes = jax.random.uniform(jax.random.key(0), (256, 1, 16))
  wide = jax.random.normal(jax.random.key(1), (16, 1024))
  params = {
    "wide": wide,
    "head": jnp.linalg.pinv(jax.nn.relu(codes[:, 0] @ wide)),
  }  # tells all codes
  logits_fn = lambda p, x: jax.nn.relu(x @ p["wide"]) @ p["head"]
  forget = jnp.arange(256) < 3

  def judged():
    def logits(params):
      sides = forget, ~forget
      problem = resolve(logits_fn, params, codes, sides, None, None, None, "highest", None)
      return problem.logits(params)

    return temporary(logits, params), jax.jit(logits)(params)

  memory, whole = judged()
  activations = 4 * 256 * (1024 + 256)
  monkeypatch.setattr(passes, "_PASS_BYTES", activations // 8)
  jax.clear_caches()
  less, parts = judged()
  assert less < memory - activations / 2
  np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
