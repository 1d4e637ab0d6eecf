"""What contractions read and write, on average over the codes of each class, at any params."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import make_codes

import mnemonic_jax as mj
from mnemonic_jax.methods.request import resolve

CLASSES, PER_CLASS = 4, 3


def problem_of(logits_fn, params, codes, execution=None, mask=None):
  forget = np.arange(CLASSES) == 0
  return resolve(
    logits_fn, params, codes, (forget, ~forget), None, mask, None, "highest", execution
  )


def class_means(values):
  """(N, ..., F) -> (C, F): over the codes of a class, and all axes between."""
  values = np.asarray(values, np.float64)
  flat = values.reshape(CLASSES, PER_CLASS, -1, values.shape[-1])
  return flat.mean((1, 2))


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolve(images, kernel):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=numbers)


def convnet(params, x):
  """Logits, and by hand what each kernel reads and writes."""
  images = x.reshape(-1, 4, 4, 2)
  made = convolve(images, params["conv"])
  hidden = jax.nn.relu(made + params["bias"][None, None, None])
  mixed = hidden @ params["mix"]
  pooled = jnp.tanh(mixed).mean((1, 2))
  logits = pooled @ params["head"]
  by_hand = {
    "['conv']": (images, made),
    "['mix']": (hidden, mixed),
    "['head']": (pooled[:, None], logits[:, None]),
  }
  return logits, by_hand


CONVNET = {
  "conv": draw(0, 3, 3, 2, 5),
  "bias": draw(1, 5),
  "mix": draw(2, 5, 6),
  "head": draw(3, 6, 4),
}


@pytest.mark.parametrize("microbatch", [None, 5])
def test_sites_are_those_of_the_model_at_other_params_too(microbatch):
  codes = make_codes(classes=CLASSES, per_class=PER_CLASS, features=32)
  logits_fn = lambda params, x: convnet(params, x)[0]
  problem = problem_of(logits_fn, CONVNET, codes, mj.Execution(microbatch))
  other = jax.tree.map(lambda leaf: 0.5 * leaf + 0.1, CONVNET)
  for params in (CONVNET, other):
    found = problem.sites(params)
    wanted = convnet(params, codes.reshape(-1, 32))[1]
    assert [site.paths for site in found] == [(path,) for path in wanted]
    assert [site.rule for site in found] == ["convolution", "product", "product"]
    for site in found:
      reads, writes = map(class_means, wanted[site.paths[0]])
      np.testing.assert_allclose(site.reads, reads, rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(site.writes, writes, rtol=1e-4, atol=1e-6)
  assert not np.allclose(problem.sites(CONVNET)[2].reads, problem.sites(other)[2].reads)


def test_layers_of_a_scan_have_an_axis_of_their_own_and_remat_changes_nothing():
  codes = make_codes(classes=CLASSES, per_class=PER_CLASS, features=5)
  params = {"layers": draw(0, 3, 5, 5), "last": draw(1, 5, 4)}

  def logits_fn(params, x):
    block = jax.checkpoint(lambda h, kernel: (jnp.tanh(h @ kernel), None))
    return jax.lax.scan(block, x, params["layers"])[0] @ params["last"]

  layers, last = problem_of(logits_fn, params, codes).sites(params)
  assert layers.paths == ("['layers']",) and layers.reads.shape == (3, CLASSES, 5)
  hidden = codes.reshape(-1, 5)
  for layer in range(3):
    np.testing.assert_allclose(layers.reads[layer], class_means(hidden), rtol=1e-4, atol=1e-6)
    made = hidden @ params["layers"][layer]
    np.testing.assert_allclose(layers.writes[layer], class_means(made), rtol=1e-4, atol=1e-6)
    hidden = jnp.tanh(made)
  np.testing.assert_allclose(last.reads, class_means(hidden), rtol=1e-4, atol=1e-6)


def test_heads_are_flattened_as_the_kernel_contracts_them():
  """An attention's output projection contracts heads and their width, and writes one stream."""
  codes = make_codes(classes=CLASSES, per_class=PER_CLASS, features=12)
  params = {"split": draw(0, 4, 2, 3), "join": draw(1, 2, 3, 4)}

  def both(params, x):
    heads = jnp.einsum("ntd,dhe->nthe", x.reshape(-1, 3, 4), params["split"])
    return heads, jnp.einsum("nthe,hed->ntd", heads, params["join"])

  problem = problem_of(lambda p, x: jnp.tanh(both(p, x)[1]).mean(1), params, codes)
  split, join = problem.sites(params)
  heads, joined = both(params, codes.reshape(-1, 12))
  flat = heads.reshape(len(heads), 3, 6)
  np.testing.assert_allclose(split.writes, class_means(flat), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(join.reads, class_means(flat), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(join.writes, class_means(joined), rtol=1e-4, atol=1e-6)


def test_what_is_used_in_another_way_or_masked_is_no_site():
  codes = make_codes(classes=CLASSES, per_class=PER_CLASS, features=5)
  params = {"tied": draw(0, 5, 5), "head": draw(1, 5, 4), "kept": draw(2, 5, 5), "norm": draw(3, 5)}

  def logits_fn(params, x):
    hidden = jnp.tanh(x @ params["tied"]) @ params["tied"].T
    return (jnp.tanh(hidden @ params["kept"]) * params["norm"][None]) @ params["head"]

  mask = {"tied": True, "head": True, "kept": False, "norm": True}
  found = problem_of(logits_fn, params, codes, mask=mask).sites(params)
  assert [site.paths for site in found] == [("['head']",)]


def test_sites_inside_a_trace():
  codes = make_codes(classes=CLASSES, per_class=PER_CLASS, features=32)
  logits_fn = lambda params, x: convnet(params, x)[0]

  def traced(params):
    problem = problem_of(logits_fn, params, codes)
    return [(site.reads, site.writes) for site in problem.sites(params)]

  concrete = problem_of(logits_fn, CONVNET, codes).sites(CONVNET)
  for site, (reads, writes) in zip(concrete, jax.jit(traced)(CONVNET), strict=True):
    np.testing.assert_allclose(reads, site.reads, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(writes, site.writes, rtol=1e-5, atol=1e-6)
