"""Each contraction of the Fisher engine against JAX's own gradient of one example, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from mnemonic_jax.fisher import rules, sums
from mnemonic_jax.fisher.jaxprs import without_jits

N = 5  # examples
# Two groups that share examples, and two that do not; no group has example 2.
OVERLAPPING = np.array([[0.5, 1.5, 0.0, 0.0, 2.0], [1.0, 0.3, 0.0, 0.7, 0.0]], np.float32)
DISJOINT = np.array([[0.0, 1.5, 0.0, 0.4, 0.0], [1.0, 0.0, 0.0, 0.0, 0.7]], np.float32)
# Bytes of a chunk at which these small equations take one tap, or a few examples, at a time.
ONE, FEW = 1, 2**11
# The ways of computing: (platform, weights, whether groups share no example, bytes of a chunk).
WAYS = {
  "cpu, a few taps at a time": ("cpu", OVERLAPPING, False, FEW),
  "cpu, groups apart, tap by tap": ("cpu", DISJOINT, True, ONE),
  "accelerator": ("gpu", OVERLAPPING, False, sums.CHUNK_BYTES),
  "accelerator, a few examples at a time": ("gpu", OVERLAPPING, False, FEW),
}


@pytest.fixture(autouse=True)
def strict_numerics():
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
    yield


class Case(NamedTuple):
  """An equation with a leaf as operand `index`, and what its other operand is for each example."""

  equation: Any
  index: int
  leaf: np.ndarray
  data: np.ndarray  # (N, ...)
  g: np.ndarray  # (N, ...), the cotangent of the result


def made(function, arguments, index, draw):
  """The case of the one contraction in `function`; data have a first axis of examples."""
  one = [x if at == index else x[0] for at, x in enumerate(arguments)]
  closed = jax.make_jaxpr(function)(*one)
  jaxpr, consts = without_jits(closed.jaxpr, closed.consts)
  (at,) = (
    at for at, equation in enumerate(jaxpr.eqns) if equation.primitive.name in rules.BY_PRIMITIVE
  )
  equation = jaxpr.eqns[at]
  before = jaxpr.replace(eqns=jaxpr.eqns[:at], outvars=[equation.invars[1 - index]])
  operand = jex.jaxpr_as_fun(jex.ClosedJaxpr(before, consts))
  axes = [None if at == index else 0 for at in range(2)]
  data = np.asarray(jax.vmap(lambda *both: operand(*both)[0], axes)(*arguments))
  g = draw.normal(size=(N, *equation.outvars[0].aval.shape)).astype(np.float32)
  return Case(equation, index, arguments[index], data, g)


# --- products

PRODUCTS = {  # axes of the data and of the leaf, by letters; those in both are contracted, or batch
  "dense": ("d,do", ""),
  "dense over tokens": ("td,do", ""),
  "dense over a leaf transposed": ("td,od", ""),
  "tokens inside": ("tds,do", ""),
  "heads out": ("td,dhe", ""),
  "heads in": ("the,hed", ""),
  "heads in, in another order": ("teh,hde", ""),
  "channels between": ("td,hde", ""),
  "a vector": ("td,d", ""),
  "a number": ("td,", ""),
  "an outer product": ("t,k", ""),
  "all contracted": ("ij,ij", ""),
  "all contracted, transposed": ("ij,ji", ""),
  "experts": ("etd,edf", "e"),
  "experts inside": ("tde,fed", "e"),
  "experts at one position": ("ed,edf", "e"),
  "two batch axes": ("abtc,bacd", "ab"),
  "two batch axes the other way": ("tbca,dabc", "ba"),
  "two batch axes, out of order in the data": ("tbca,dabc", "ab"),
  "all batch": ("ij,ij", "ij"),
  "all batch, transposed": ("ij,ji", "ij"),
  "a matrix at every place": ("hwc,hwcd", "hw"),
}
SIDES = "left", "right"
SIZES = dict(zip("abcdefhijkostw", (2, 3, 4, 5, 2, 3, 2, 4, 3, 5, 3, 2, 4, 3), strict=True))


def products(draw):
  for name, (letters, batch) in PRODUCTS.items():
    data, leaf = letters.split(",")
    places = lambda axes, letters: tuple(axes.index(letter) for letter in letters)
    drawn = lambda axes, *lead: draw.normal(size=(*lead, *(SIZES[a] for a in axes)))
    both = drawn(data, N).astype(np.float32), drawn(leaf).astype(np.float32)
    for index in (0, 1):
      axes = (data, leaf) if index else (leaf, data)
      contracted = [a for a in axes[0] if a in axes[1] and a not in batch]  # in the left's order
      numbers = tuple(
        tuple(places(one, letters) for one in axes) for letters in (contracted, batch)
      )
      product = lambda a, b, numbers=numbers: jax.lax.dot_general(a, b, numbers)
      arguments = both if index else both[::-1]
      yield f"{name}, leaf on the {SIDES[index]}", made(product, arguments, index, draw)


# --- convolutions

_NHWC, _NWC, _NDHWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")
_NCHW, _MIXED = ("NCHW", "OIHW", "NCHW"), ("NCHW", "HOIW", "NWHC")
CONVOLUTIONS = {  # (shape of one example, shape of the kernel, layout, settings)
  "1-D": ((1, 7, 3), (3, 3, 4), _NWC, {}),
  "2-D": ((1, 5, 4, 3), (3, 2, 3, 4), _NHWC, {}),
  "same": ((1, 5, 4, 3), (3, 2, 3, 4), _NHWC, {"padding": "SAME"}),
  "3-D": ((1, 3, 4, 3, 2), (2, 2, 2, 2, 3), _NDHWC, {"strides": (1, 2, 1), "padding": "SAME"}),
  "3-D, side by side": ((1, 4, 4, 3, 2), (2, 2, 3, 2, 3), _NDHWC, {"strides": (2, 2, 3)}),
  "frames": ((3, 4, 3, 2), (3, 3, 2, 3), _NHWC, {"padding": "SAME"}),
  "frames, channels first": ((2, 4, 4, 3), (4, 2, 2, 2), _NCHW, {"groups": 2, "padding": "SAME"}),
  "frames, side by side": ((3, 4, 4, 2), (2, 2, 2, 3), _NHWC, {"strides": (2, 2)}),
  "stride": ((1, 6, 5, 2), (3, 3, 2, 3), _NHWC, {"strides": (2, 2)}),
  "stride leaves a rest": ((1, 8, 7, 2), (2, 3, 2, 3), _NHWC, {"strides": (3, 3)}),
  "stride beyond the kernel": ((1, 7, 7, 2), (1, 2, 2, 3), _NHWC, {"strides": (3, 3)}),
  "side by side": ((1, 6, 9, 2), (2, 3, 2, 3), _NHWC, {"strides": (2, 3)}),
  "side by side, grouped, a rest": (
    *((1, 5, 8, 4), (2, 3, 2, 6), _NHWC),
    {"strides": (2, 3), "groups": 2},
  ),
  "side by side, padded": (
    *((1, 3, 8, 5), (2, 4, 3, 3), _MIXED),
    {"strides": (2, 3), "padding": "SAME"},
  ),
  "even kernel, same stride": (
    *((1, 5, 6, 2), (2, 4, 2, 3), _NHWC),
    {"strides": (2, 2), "padding": "SAME"},
  ),
  "windows as far apart as they are long, dilated": (
    *((1, 8, 9, 2), (2, 3, 2, 3), _NHWC),
    {"strides": (2, 3), "rhs_dilation": (2, 1)},
  ),
  "dilated kernel": ((1, 7, 6, 2), (3, 2, 2, 3), _NHWC, {"rhs_dilation": (2, 3)}),
  "dilated input": (
    *((1, 4, 3, 2), (3, 3, 2, 3), _NHWC),
    {"padding": ((0, 1), (2, 0)), "lhs_dilation": (2, 3)},
  ),
  "asymmetric padding": ((1, 4, 4, 2), (3, 3, 2, 3), _NHWC, {"padding": ((0, 2), (3, 1))}),
  # Not (-1, 1): with negative low and at most as much high padding XLA reads out of bounds
  # (openxla/xla#48713).
  "negative padding": ((1, 6, 7, 2), (2, 3, 2, 3), _NHWC, {"padding": ((-1, 2), (-1, -2))}),
  "negative padding of a dilated input": (
    *((1, 4, 3, 2), (2, 2, 2, 3), _NHWC),
    {"padding": ((-2, 0), (1, -1)), "lhs_dilation": (2, 2)},
  ),
  "groups": ((1, 4, 4, 4), (3, 3, 2, 6), _NHWC, {"groups": 2, "padding": "SAME"}),
  "depthwise": ((1, 4, 4, 3), (3, 3, 1, 3), _NHWC, {"groups": 3}),
  "depthwise, multiplied": ((1, 4, 4, 3), (3, 3, 1, 6), _NHWC, {"groups": 3, "padding": "SAME"}),
  "channels first": ((1, 3, 5, 4), (4, 3, 2, 3), _NCHW, {"padding": "SAME"}),
  "groups, channels first, 1-D": ((1, 4, 6), (6, 2, 3), ("NCH", "OIH", "NCH"), {"groups": 2}),
  "mixed layouts": (
    *((1, 3, 5, 4), (2, 4, 3, 3), _MIXED),
    {"strides": (1, 2), "padding": "SAME"},
  ),
  "one by one": ((1, 3, 4, 2), (1, 1, 2, 3), _NHWC, {}),
  "one by one, stride": ((1, 4, 5, 2), (1, 1, 2, 3), _NHWC, {"strides": (2, 2)}),
  "whole image": ((1, 3, 4, 2), (3, 4, 2, 5), _NHWC, {}),
  "whole image, groups": ((1, 3, 4, 4), (3, 4, 2, 6), _NHWC, {"groups": 2}),
  "larger than the image": ((1, 2, 2, 2), (4, 3, 2, 3), _NHWC, {"padding": ((2, 1), (1, 1))}),
  "everything": (
    *((1, 6, 5, 4), (2, 3, 2, 6), _NHWC),
    {
      "strides": (2, 1),
      "padding": ((1, 2), (3, -1)),
      "lhs_dilation": (1, 2),
      "rhs_dilation": (3, 2),
      "groups": 2,
    },
  ),
}


def convolutions(draw):
  for name, (example, kernel, layout, settings) in CONVOLUTIONS.items():
    settings = {"strides": (1,) * (len(kernel) - 2), "padding": "VALID", "groups": 1} | settings
    strides, padding, groups = (settings.pop(key) for key in ("strides", "padding", "groups"))

    def convolve(x, w, strides=strides, padding=padding, layout=layout, groups=groups, **more):
      settings = {"dimension_numbers": layout, "feature_group_count": groups} | more
      return jax.lax.conv_general_dilated(x, w, strides, padding, **settings)

    arrays = (draw.normal(size=shape).astype(np.float32) for shape in ((N, *example), kernel))
    yield (
      name,
      made(lambda x, w, f=convolve, more=settings: f(x, w, **more), tuple(arrays), 1, draw),
    )


# --- lookups


def _batched_once(p, x):
  return jax.vmap(lambda index: p[index])(x)


def _batched_twice(p, x):
  return jax.vmap(jax.vmap(lambda index: p[index]))(x)


def _rows_in_front_of_tokens(p, x):
  return jax.vmap(lambda index: p[index], out_axes=-1)(x)


def _at(mode, **settings):
  return lambda p, x: p.at[x].get(mode=mode, **settings)


def _at_row_and_start(p, x):
  places = jnp.stack([jnp.zeros_like(x), x], axis=-1)
  numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (1, 0))
  sizes = (1, p.shape[1])
  return jax.lax.gather(p, places, numbers, sizes, mode="clip")


def _sliced(p, x):
  settings = {"allow_negative_indices": False}
  return jax.lax.dynamic_slice(p, (x, jnp.int32(0)), (1, p.shape[1]), **settings)


# (function of the table and one example's numbers, shape of the table, of the numbers, from, to)
LOOKUPS = {
  "few tokens of many rows": (_at("fill"), (40, 3), (4,), 0, 40),
  "few tokens, repeated": (_at("fill"), (40, 3), (6,), 7, 9),
  "many tokens of few rows": (_at("fill"), (4, 3), (6,), 0, 4),
  "one token": (_at("fill"), (7, 3), (), 0, 7),
  "one row": (_at("fill"), (1, 3), (3,), 0, 1),
  "rows that are matrices": (_at("fill"), (9, 2, 3), (4,), 0, 9),
  "rows that are numbers": (_at("fill"), (9,), (6,), 0, 9),
  "two axes of tokens": (_at("fill"), (30, 3), (2, 3), 0, 30),
  "under vmap": (_batched_once, (30, 3), (4,), 0, 30),
  "under vmap twice": (_batched_twice, (30, 3), (2, 3), 0, 30),
  "under vmap twice, few rows": (_batched_twice, (3, 2), (4, 3), 0, 3),
  "features before tokens": (_rows_in_front_of_tokens, (30, 3), (4,), 0, 30),
  "features before tokens, few rows": (_rows_in_front_of_tokens, (3, 2, 2), (4,), 0, 3),
  "clipped": (_at("clip", wrap_negative_indices=False), (30, 2), (8,), -20, 60),
  "clipped, few rows": (_at("clip", wrap_negative_indices=False), (4, 2), (8,), -4, 9),
  "filled": (_at("fill", wrap_negative_indices=False), (30, 2), (8,), -20, 60),
  "filled, few rows": (_at("fill", wrap_negative_indices=False), (4, 2), (8,), -4, 9),
  "clipped with the place of a column": (_at_row_and_start, (6, 3), (4,), -3, 9),
  "a dynamic slice": (_sliced, (6, 3), (), 0, 6),
}
NARROW = {  # (mode, dtype of the numbers, rows of the table)
  "uint8 of 256": ("fill", np.uint8, 256),
  "uint8 of 300": ("clip", np.uint8, 300),
  "int8 of 100": ("fill", np.int8, 100),
  "uint32 beyond int32": ("clip", np.uint32, 6),
  "uint32 beyond int32, filled": ("fill", np.uint32, 6),
}


def lookups(draw):
  for name, (function, table, tokens, low, high) in LOOKUPS.items():
    numbers = draw.integers(low, high, (N, *tokens)).astype(np.int32)
    arguments = draw.normal(size=table).astype(np.float32), numbers
    yield name, made(function, arguments, 0, draw)
  for name, (mode, dtype, rows) in NARROW.items():
    most = np.iinfo(dtype).max
    numbers = draw.integers(0, min(rows, most + 1), (N, 4)).astype(dtype)
    numbers[0, 0] = most if dtype != np.int8 else rows - 1
    arguments = draw.normal(size=(rows, 2)).astype(np.float32), numbers
    yield name, made(_at(mode, wrap_negative_indices=False), arguments, 0, draw)


KINDS = {"product": products, "convolution": convolutions, "lookup": lookups}


@cache
def cases(kind):
  return dict(KINDS[kind](np.random.default_rng(0)))


@cache
def squares(kind):
  """Each example's squared gradient, (N, *leaf.shape), by JAX's gradient of the equation."""

  def of_case(case, leaf, data, g):
    settings = case.equation.params | (
      {"preferred_element_type": None} if "preferred_element_type" in case.equation.params else {}
    )

    def pulled(data, g):
      literals = [atom.val for atom in case.equation.invars[2:]]
      operands = lambda leaf: (leaf, data) if case.index == 0 else (data, leaf)
      run = lambda leaf: case.equation.primitive.bind(*operands(leaf), *literals, **settings)
      return jax.vjp(run, leaf)[1](g)[0]

    return jnp.square(jax.vmap(pulled)(data, g))

  with jax.enable_x64(True):
    wide = lambda x: np.asarray(x, np.float64) if np.issubdtype(x.dtype, np.floating) else x
    arrays = {name: tuple(map(wide, case[2:])) for name, case in cases(kind).items()}
    run = lambda arrays: {name: of_case(cases(kind)[name], *x) for name, x in arrays.items()}
    return jax.tree.map(np.asarray, jax.jit(run)(arrays))


@cache
def contracted(kind, way):
  """What every case of a kind comes to in one way of computing, from one program."""
  platform, weights, disjoint, chunk = WAYS[way]

  def run(arrays, weights):
    groups = sums.Groups.make(weights, disjoint, platform=platform)
    found = {}
    for name, (data, g) in arrays.items():
      rule = rules.contractor(cases(kind)[name].equation, cases(kind)[name].index)
      found[name] = rule.contract(rule.data_of(data), g, groups)
    return found

  unweighted = np.all(weights == 0, axis=0)
  no_number = lambda x: np.where(unweighted.reshape(-1, *(1,) * (x.ndim - 1)), np.nan, x)
  arrays = {name: (case.data, no_number(case.g)) for name, case in cases(kind).items()}
  before, sums.CHUNK_BYTES = sums.CHUNK_BYTES, chunk
  jax.clear_caches()
  try:
    return jax.tree.map(np.asarray, jax.jit(run)(arrays, weights))
  finally:
    sums.CHUNK_BYTES = before
    jax.clear_caches()


# Written out, for cases take seconds to make.
NAMES = {
  "product": [f"{name}, leaf on the {side}" for name in PRODUCTS for side in SIDES],
  "convolution": list(CONVOLUTIONS),
  "lookup": [*LOOKUPS, *NARROW],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_sums_of_squared_gradients(kind, name, way):
  """The cotangent of the example without any weight is NaN, and leaves no trace."""
  weights = WAYS[way][1].astype(np.float64)
  wanted = np.einsum("gn,n...->g...", weights, squares(kind)[name])
  found = contracted(kind, way)[name]
  assert found.shape == wanted.shape and np.max(wanted) > 0
  np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6 * np.max(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_fits(kind):
  assert list(cases(kind)) == NAMES[kind]
  for case in cases(kind).values():
    rule = rules.contractor(case.equation, case.index)
    operands = ["data", "data"]
    operands[case.index] = frozenset([0])
    assert rule.name == kind and rule.data_index == 1 - case.index
    assert rule.fits(case.equation, [case.index], operands)
