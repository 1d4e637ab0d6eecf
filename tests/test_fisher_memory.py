"""What a pass holds, from the compiled program.

That is a batch gradient's memory, the sums, and what `explain_fisher` says.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnemonic_jax as mj
from mnemonic_jax import _mesh
from mnemonic_jax.fisher import jaxprs, passes, sums
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
  """Also without a convolution, which stands in no loop on CPU; a few at a time judge as all do."""
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


# --- contractions that must never take more than a gradient per example does


def integers(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def squares_of_each(loss):
  """The mean of squared per-example gradients as `vmap(grad)` has it."""
  one = jax.grad(lambda p, x, y: loss(p, x[None], y[None])[0])
  each = jax.vmap(one, (None, 0, 0))
  return lambda *arguments: jax.tree.map(lambda g: jnp.mean(g * g, 0), each(*arguments))


def pass_on(platform, loss, examples):
  """One pass over all examples, as the platform would be given it."""
  objective = passes.Objective(loss, (True,), "highest", placement=_mesh.Placement(platform))
  return lambda p, x, y, w: passes.fisher_program(objective, examples, p, (x, y), w)


def embedding_loss(table, x, y):
  return jnp.sum(jnp.sin(table[x]), axis=(1, 2))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
  ("examples", "tokens", "rows"),
  [(2, 1024, 256), (2, 8192, 256), (2, 65_536, 256), (4, 300, 256), (4, 16, 10**6)],
)
def test_a_lookup_takes_no_more_than_gradients_of_each_example(platform, examples, tokens, rows):
  """Linear in the tokens, at most one whole table of sums, and as much as `explain_fisher` says."""
  arguments = shaped(rows, 8), integers(examples, tokens), shaped(examples)
  plain = temporary(squares_of_each(embedding_loss), *arguments)
  ours = temporary(pass_on(platform, embedding_loss, examples), *arguments, shaped(1, examples))
  assert ours <= 2 * plain + 2**18
  (row,) = mj.explain_fisher(embedding_loss, *arguments).leaves
  assert row.rule == "lookup" and 0 < row.bytes <= 3 * tokens * 8 * 4


def waveform_loss(kernel, x, y):
  numbers = ("NWC", "WIO", "NWC")
  convolved = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)
  return jnp.sum(jnp.sin(convolved), axis=(1, 2))


@pytest.mark.parametrize("examples", [1, 64])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_long_kernel_takes_a_bounded_number_of_patches(platform, examples):
  arguments = shaped(251, 32, 32), shaped(examples, 16_000, 32), shaped(examples)
  plain = temporary(squares_of_each(waveform_loss), *arguments)
  ours = temporary(pass_on(platform, waveform_loss, examples), *arguments, shaped(1, examples))
  patches = 251 * 16_000 * 32 * 4
  assert ours <= plain + sums.CHUNK_BYTES + 2**20 < plain + patches / 5
  (row,) = mj.explain_fisher(waveform_loss, *arguments).leaves
  gradient = 4 * 251 * 32 * 32
  assert row.rule == "convolution" and gradient < row.bytes <= gradient + sums.CHUNK_BYTES


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_long_kernel_in_parts_is_right(platform, monkeypatch):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)
  arguments = draw(251, 3, 5), draw(3, 400, 3), jnp.zeros(3)
  wanted = jax.jit(squares_of_each(waveform_loss))(*arguments)
  monkeypatch.setattr(sums, "CHUNK_BYTES", 2**17)  # 27 taps of an example at a time, with a rest
  jax.clear_caches()
  made = pass_on(platform, waveform_loss, 3)(*arguments, jnp.full((1, 3), 1 / 3))
  jax.clear_caches()
  (found,) = made.in_range()
  np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-6 * float(jnp.max(wanted)))


def product_loss(p, x, y):
  return jnp.sum(jnp.sin(x @ p), axis=tuple(range(1, x.ndim)))


@pytest.mark.parametrize(
  ("loss", "leaf", "example", "held"),
  [
    # One gradient where a product sums over positions; at one position nothing of that size.
    (product_loss, (512, 256), shaped(3, 512), 4 * 512 * 256),
    (product_loss, (512, 256), shaped(512), 0),
    # Three rows for a token, or the whole table where that is smaller.
    (embedding_loss, (10**6, 8), integers(100), 3 * 100 * 8 * 4),
    (embedding_loss, (50, 8), integers(100), 50 * 8 * 4),
    (waveform_loss, (251, 4, 4), shaped(900, 4), 4 * 251 * 4 * 4 + 4 * 251 * 900 * 4),
  ],
)
def test_the_automatic_microbatch_counts_what_contractions_hold(
  loss, leaf, example, held, monkeypatch
):
  objective = passes.Objective(loss, (True,), None)
  one = shaped(*leaf), jax.ShapeDtypeStruct((1, *example.shape), example.dtype), shaped(1)
  each = jaxprs.activation_bytes(jax.make_jaxpr(loss)(*one).jaxpr) // 2
  if example.ndim == 1 and held == 0:
    each += 4 * min(leaf)  # the smaller side of the product, weighed
  many = 10_000
  batch = jax.ShapeDtypeStruct((many, *example.shape), example.dtype), shaped(many)
  monkeypatch.setattr(passes, "_PASS_BYTES", held + 10 * each)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # CPU takes all where it convolves
  assert passes.examples_at_once(objective, one[0], batch, jnp.ones((1, many)), None) == 10
