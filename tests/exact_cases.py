"""Small models that use params in every way we know, for `test_fisher_exact.py`.

Each case is a function of a `Draw` that returns (loss_fn, params, inputs, labels), all arrays in
NumPy and float32. What a case does with its result is mostly beside the point: `score` turns any
array into one number per example. One case stands for each thing that the engine decides; how a
product, a convolution or a lookup is then contracted is for `test_contractions.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex
from jax.interpreters import ad, batching

import mnemonic_jax as mj

N = 5  # examples


class Case(NamedTuple):
  make: Callable[[], tuple[Any, Any, Any, Any]]
  tolerance: float = 1e-5  # in float32, relative to the largest entry of a leaf
  x64: bool = True  # whether the case has a float64 form
  concrete: bool = False  # whether it is also computed outside jit, with groups apart and not


CASES: dict[str, Case] = {}


class Draw:
  """Random arrays."""

  def __init__(self, name: str) -> None:
    self.rng = np.random.default_rng(zlib.crc32(name.encode()))

  def __call__(self, *shape: int, scale: float = 0.6) -> np.ndarray:
    return np.asarray(self.rng.normal(size=shape) * scale, np.float32)

  def ints(self, high: int, *shape: int, low: int = 0) -> np.ndarray:
    return np.asarray(self.rng.integers(low, high, shape), np.int32)

  def like(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """A tree of the shapes that a module's initialisation would return."""
    return jax.tree.map(lambda leaf: self(*leaf.shape), jax.eval_shape(function, *arguments))

  @property
  def labels(self) -> np.ndarray:
    return self.ints(3, N)


def case(function: Callable[[Draw], Any] | None = None, *, name: str = "", **settings: Any) -> Any:
  """Register a case under `name`, or the name of its function."""
  if function is None:
    return partial(case, name=name, **settings)
  name = name or function.__name__
  assert name not in CASES, name
  CASES[name] = Case(lambda: function(Draw(name)), **settings)
  return function


def score(values: jax.Array, labels: jax.Array) -> jax.Array:
  """(N, ...) -> (N,), with a gradient that is different in every element."""
  flat = values.reshape(values.shape[0], -1)
  return jnp.sum(jnp.sin(1.3 * flat + jnp.arange(flat.shape[1]) % 3 + labels[:, None]), axis=-1)


def scored(model: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any, Any], jax.Array]:
  """The loss of a model of the whole batch, (params, inputs) -> (N, ...)."""
  return lambda params, inputs, labels: score(model(params, inputs), labels)


def one_by_one(model: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any, Any], jax.Array]:
  """The loss of a model of a single example, under `jax.vmap`."""
  return scored(lambda params, inputs: jax.vmap(partial(model, params))(inputs))


def classified(model: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any, Any], jax.Array]:
  return lambda params, inputs, labels: mj.softmax_cross_entropy(model(params, inputs), labels)


def layer_norm(x: jax.Array, scale: Any = 1.0, bias: Any = 0.0) -> jax.Array:
  centred = x - x.mean(-1, keepdims=True)
  return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3) * scale + bias


# --- dense layers and einsums


@case
def dense(draw):
  return (
    scored(lambda p, x: x @ p["w"] + p["b"]),
    {"w": draw(4, 3), "b": draw(3)},
    draw(N, 4),
    draw.labels,
  )


@case(concrete=True)
def dense_tokens(draw):
  return (
    scored(lambda p, x: x @ p["w"] + p["b"]),
    {"w": draw(4, 3), "b": draw(3)},
    draw(N, 5, 4),
    draw.labels,
  )


EINSUMS = {  # (equation, shape of the data, shape of the param)
  "param_first": ("fd,ntd->ntf", (4, 3), (5, 3)),
  "experts": ("netd,edf->netf", (2, 4, 3), (2, 3, 4)),
  "diagonal_of_param": ("ni,ii->ni", (3,), (3, 3)),
}


def _einsum(equation, data, param, draw):
  first = equation.split(",")[0]
  param_first = "n" not in first and "b" not in first
  out = equation.split("->")[1].index("n" if "n" in equation else "b")

  def model(p, x):
    y = jnp.einsum(equation, *((p, x) if param_first else (x, p)))
    return jnp.moveaxis(y, out, 0)

  return scored(model), draw(*param), draw(N, *data), draw.labels


for _name, _arguments in EINSUMS.items():
  case(partial(_einsum, *_arguments), name=f"einsum_{_name}")


@case
def dense_of_integers(draw):
  return scored(lambda w, x: x @ w), draw(4, 3), draw.ints(5, N, 6, 4), draw.labels


@case
def dense_of_no_tokens_and_some(draw):
  model = lambda p, x: x["some"] @ p["w"] + jnp.sum(x["none"] @ p["v"])
  return (
    scored(model),
    {"w": draw(4, 3), "v": draw(4, 3)},
    {"some": draw(N, 4), "none": draw(N, 0, 4)},
    draw.labels,
  )


@case
def leaf_without_elements(draw):
  model = lambda p, x: x["some"] @ p["w"] + jnp.sum(x["none"] @ p["empty"])
  params, inputs = {"w": draw(4, 3), "empty": draw(0, 3)}, {"some": draw(N, 4), "none": draw(N, 0)}
  return scored(model), params, inputs, draw.labels


@case
def used_twice(draw):
  return scored(lambda w, x: jnp.tanh(x @ w) @ w), draw(4, 4), draw(N, 3, 4), draw.labels


@case
def used_and_penalised_without_data(draw):
  loss = lambda w, x, y: score(x @ w, y) + 0.1 * jnp.sum(w**2)
  return loss, draw(4, 3), draw(N, 4), draw.labels


@case
def the_loss_is_the_param(draw):
  return (
    lambda p, x, y: jnp.broadcast_to(p["a"], x.shape[:1]),
    {"a": draw(), "b": draw(2)},
    draw(N, 4),
    draw.labels,
  )


@case
def unused_leaf(draw):
  return (
    scored(lambda p, x: x @ p["w"]),
    {"w": draw(4, 3), "unused": draw(2, 2)},
    draw(N, 4),
    draw.labels,
  )


# --- convolutions

_NHWC, _NWC, _NDHWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")
CONVOLUTIONS = {  # (shape of one example, shape of the kernel, layout, settings)
  "groups": ((4, 4, 4), (3, 3, 2, 6), _NHWC, {"feature_group_count": 2, "padding": "SAME"}),
  "whole_image": ((3, 4, 2), (3, 4, 2, 5), _NHWC, {}),
}


def convolve(x, kernel, layout=_NHWC, *, window_strides=None, padding="VALID", **settings):
  strides = window_strides or (1,) * (x.ndim - 2)
  return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout, **settings)


def _convolution(example, kernel, layout, settings, draw):
  model = lambda w, x: convolve(x, w, layout, **settings)
  return scored(model), draw(*kernel), draw(N, *example), draw.labels


for _name, _arguments in CONVOLUTIONS.items():
  case(
    partial(_convolution, *_arguments),
    name=f"conv_{_name}",
    concrete=_name == "groups",
  )


@case
def conv_transpose_of_the_forward_kernel(draw):
  model = lambda w, x: lax.conv_transpose(
    x, w, (2, 2), "VALID", dimension_numbers=_NHWC, transpose_kernel=True
  )
  return scored(model), draw(3, 2, 3, 2), draw(N, 3, 2, 2), draw.labels


@case
def conv_with_batch_groups(draw):
  def model(w, frames):
    return lax.conv_general_dilated(
      frames, w, (1, 1), "SAME", dimension_numbers=_NHWC, batch_group_count=2
    )

  return one_by_one(model), draw(3, 3, 2, 4), draw(N, 4, 4, 3, 2), draw.labels


@case
def conv_of_a_learnt_image_with_kernels_from_data(draw):
  model = lambda p, kernel: convolve(p[None], kernel, padding="SAME")
  return one_by_one(model), draw(4, 4, 2), draw(N, 3, 3, 2, 3), draw.labels


# --- broadcast, added and multiplied params


@case
def bias_and_scale_in_odd_positions(draw):
  def model(p, x):
    y = x * p["row"] + p["channel"]
    return y * p["one"] + p["scalar"] * jnp.sin(y) + p["plane"]

  params = {
    "row": draw(1, 4, 1),
    "channel": draw(3, 1, 1),
    "one": draw(1),
    "scalar": draw(),
    "plane": draw(1, 4, 2),
  }
  return scored(model), params, draw(N, 3, 4, 2), draw.labels


@case
def odd_operations_on_params(draw):
  def model(p, x):
    y = x @ jnp.where(np.arange(4)[:, None] % 2 == 0, p["where"], 0.5)
    y = (
      y
      + jnp.pad(p["padded"], (1, 1))
      + jnp.cumsum(p["summed"])
      + jnp.sort(p["sorted"])
      + jnp.max(p["largest"])
    )
    y = y * jnp.clip(p["clipped"], -0.5, 0.5) + lax.dynamic_slice(p["sliced"], (1,), (3,))
    return y + jnp.roll(p["rolled"], 1) * jnp.tile(p["tiled"], 3) + lax.top_k(p["top"], 3)[0]

  shapes = {"padded": 1, "summed": 3, "sorted": 3, "largest": 4, "clipped": 3, "sliced": 5}
  shapes |= {"rolled": 3, "tiled": 1, "top": 4}
  return (
    scored(model),
    {"where": draw(4, 3)} | {k: draw(v) for k, v in shapes.items()},
    draw(N, 4),
    draw.labels,
  )


# --- lookups


@case(concrete=True)
def lookup_repeated_in_an_example(draw):
  model = lambda p, x: jnp.tanh(p["table"][x] @ p["w"])
  return scored(model), {"table": draw(4, 3), "w": draw(3, 2)}, draw.ints(2, N, 6), draw.labels


@case
def lookup_negative(draw):
  return scored(lambda p, x: p[x]), draw(5, 2), draw.ints(5, N, 4, low=-5), draw.labels


@case
def lookup_along_another_axis(draw):
  return (
    scored(lambda p, x: jnp.take(p, x, axis=1)[0] + p[1, x]),
    draw(2, 5, 3),
    draw.ints(5, N, 4),
    draw.labels,
  )


@case
def lookup_of_no_tokens(draw):
  model = lambda p, x: x["some"] @ p["w"] + p["table"][x["none"]].sum(1)
  inputs = {"some": draw(N, 4), "none": draw.ints(3, N, 0)}
  return scored(model), {"w": draw(4, 3), "table": draw(3, 3)}, inputs, draw.labels


@case
def lookup_of_single_elements(draw):
  return scored(lambda p, x: p[x[:, 0], x[:, 1]]), draw(4, 4, 2), draw.ints(4, N, 2), draw.labels


@case
def lookup_in_two_tables_at_once(draw):
  model = lambda p, x: jnp.concatenate([p["words"], p["extra"]])[x]
  return scored(model), {"words": draw(4, 3), "extra": draw(2, 3)}, draw.ints(6, N, 5), draw.labels


@case
def lookup_at_constant_places(draw):
  places = draw.ints(5, 3, 3)
  return scored(lambda p, x: x + p[places]), draw(5), draw(N, 3, 3), draw.labels


@case
def lookup_under_vmap_twice(draw):
  model = lambda p, x: jax.vmap(jax.vmap(lambda index: p[index]))(x)
  return scored(model), draw(40, 3), draw.ints(40, N, 4), draw.labels


@case
def lookup_of_one_number(draw):
  loss = lambda p, x, y: jnp.sum((x - jax.vmap(lambda index: p[index])(y)) ** 2, -1)
  return loss, draw(3, 4), draw(N, 4), draw.labels


@case
def lookup_by_a_dynamic_slice(draw):
  row = lambda p, index: lax.dynamic_slice_in_dim(p, index, 1)
  return one_by_one(row), draw(6, 4), draw.ints(6, N), draw.labels


@case
def lookup_of_equinox(draw):
  shapes = eqx.filter_eval_shape(lambda: eqx.nn.Embedding(9, 3, key=jax.random.key(0)))
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
  model = lambda p, x: jnp.tanh(jax.vmap(jax.vmap(p))(x))
  return scored(model), params, draw.ints(9, N, 4), draw.labels


@case(concrete=True)
def tied_embedding(draw):
  def model(p, x):
    h = jnp.tanh(p["table"][x] @ p["w"]).mean(1)
    return h @ p["table"].T

  return classified(model), {"table": draw(6, 4), "w": draw(4, 4)}, draw.ints(6, N, 3), draw.labels


@case
def scattered_into_a_param(draw):
  model = lambda p, x: p["board"].at[x["where"]].add(x["what"]) * p["scale"]
  inputs = {"where": draw.ints(5, N, 2), "what": draw(N, 2, 3)}
  return one_by_one(model), {"board": draw(5, 3), "scale": draw(3)}, inputs, draw.labels


# --- rearranged params


@case(tolerance=2**-6, x64=False)
def dense_in_bfloat16(draw):
  # Both round cotangents to bfloat16, in another order; 2**-8 each, a few of them, squared.
  def model(p, x):
    y = jnp.tanh(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16))
    return (y @ p["v"].astype(jnp.bfloat16)).astype(x.dtype)

  return scored(model), {"w": draw(4, 3), "b": draw(3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def negated(draw):
  model = lambda p, x: jnp.tanh(x @ -p["w"]) @ (-p["v"]).T
  return scored(model), {"w": draw(4, 3), "v": draw(2, 3)}, draw(N, 3, 4), draw.labels


@case
def reversed_in_both_axes(draw):
  return scored(lambda p, x: x @ p[::-1, ::-1]), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def scaled_by_constants(draw):
  table = draw(4, 3)
  model = lambda p, x: (
    (x @ (0.5 * p["a"])) * (x @ (p["b"] / -3.0)) + x @ (p["c"] * table) + x @ (p["d"] / table)
  )
  return scored(model), {k: draw(4, 3) for k in "abcd"}, draw(N, 3, 4), draw.labels


@case
def scaled_down_and_up_again(draw):
  # The gradient is of order one; the square of its cotangent before the scale leaves float32.
  return scored(lambda p, x: x @ (p * 1e-22) * 1e22), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def scalar_param_scaled(draw):
  model = lambda p, x: (
    x * (p["a"] * 0.5)
    + (p["b"] * np.array([2.0], np.float32)) * x**2
    + x @ (p["c"].reshape(1, 1) * 3)
  )
  return scored(model), {k: draw() for k in "abc"}, draw(N, 3, 1), draw.labels


@case
def slices_apart(draw):
  def model(p, x):
    q, k, v = x @ p[:, :3], x @ p[:, 3:6], x @ p[:, 6:]
    return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

  return scored(model), draw(4, 8), draw(N, 3, 4), draw.labels


@case
def slices_overlapping(draw):
  return (
    scored(lambda p, x: (x @ p[:, :3]) * (x @ p[:, 2:5])),
    draw(4, 6),
    draw(N, 3, 4),
    draw.labels,
  )


@case
def split_in_three(draw):
  def model(p, x):
    a, b, _ = jnp.split(p, 3, axis=1)
    return (x @ a) * (x @ b)

  return scored(model), draw(4, 6), draw(N, 3, 4), draw.labels


@case
def concatenated(draw):
  model = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1)
  return scored(model), {"a": draw(4, 2), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def concatenated_one_used_elsewhere(draw):
  model = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1) + jnp.sum(jnp.tanh(x @ p["a"]))
  return one_by_one(model), {"a": draw(4, 2), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def everything_at_once_on_the_way(draw):
  mask = np.asarray(draw.ints(2, 3, 4), np.float32)

  @jax.jit
  def kernel(p):
    return -(mask * (p["a"][1:].T / -2.0)[:, ::-1].T.reshape(4, 3).T)[..., None].squeeze(-1)

  model = lambda p, x: x @ jnp.concatenate([kernel(p), p["b"]]).T
  return scored(model), {"a": draw(5, 3), "b": draw(2, 4)}, draw(N, 3, 4), draw.labels


@case
def stop_gradient_on_one_of_two_uses(draw):
  model = lambda p, x: jnp.tanh(x @ p) @ lax.stop_gradient(p).T
  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def stop_gradient_on_part_of_a_leaf(draw):
  model = lambda p, x: (x @ p[:, :3]) * (x @ lax.stop_gradient(p[:, 3:]))
  return scored(model), draw(4, 6), draw(N, 3, 4), draw.labels


@case
def weight_normalised(draw):
  model = lambda p, x: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"])
  return scored(model), {"v": draw(4, 3), "g": draw(3)}, draw(N, 3, 4), draw.labels


def _power_iterations(w, steps=4):
  def body(_, v):
    v = w.T @ (w @ v)
    return v / jnp.linalg.norm(v)

  return lax.fori_loop(0, steps, body, jnp.ones_like(w[0]))


@case
def while_loop_on_stopped_params(draw):
  def model(p, x):
    frozen = lax.stop_gradient(p["w"])
    small = lambda state: jnp.sum(state**2) < 20.0
    state = lax.while_loop(small, lambda state: state + jnp.tanh(state @ frozen) + 0.5 * state, x)
    return lax.stop_gradient(state) @ p["w"] * p["scale"]

  return one_by_one(model), {"w": draw(3, 3), "scale": draw(3)}, draw(N, 3), draw.labels


# --- functions inside the function


@jax.custom_jvp
def _activation(x):
  return jnp.where(x > 0, x, 0.1 * x)


@_activation.defjvp
def _activation_jvp(primals, tangents):
  (x,), (t,) = primals, tangents
  return _activation(x), t * jax.nn.sigmoid(4 * x)  # not the true derivative


@case
def custom_jvp_on_a_param(draw):
  model = lambda p, x: x @ _activation(p["a"]) + jax.nn.relu(p["b"]) * jax.nn.silu(p["c"])
  return (
    scored(model),
    {"a": draw(4, 3), "b": 1 + draw(3), "c": draw(3)},
    draw(N, 3, 4),
    draw.labels,
  )


@jax.custom_vjp
def _clipped_dense(x, w):
  return x @ w


def _clip(g, norm):
  return g * jnp.minimum(1.0, norm / jnp.linalg.norm(g))


_clipped_dense.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda kept, g: (_clip(g @ kept[1].T, 0.4), _clip(kept[0].T @ g, 0.3)),
)


@case
def custom_vjp_that_clips(draw):
  # Whole norms of what the rule sees, which is one example.
  model = lambda p, x: _clipped_dense(jnp.tanh(_clipped_dense(x, p["a"])), p["b"])
  return one_by_one(model), {"a": draw(4, 3), "b": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def custom_vjp_around_a_param_alone(draw):
  @jax.custom_vjp
  def scale_gradient(w):
    return w

  scale_gradient.defvjp(lambda w: (w, w), lambda w, g: (g * jnp.cos(w) + 0.1 * w,))
  return scored(lambda p, x: x @ scale_gradient(p)), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def checkpoint_with_a_policy(draw):
  saved = jax.checkpoint_policies.save_only_these_names("hidden")

  @partial(jax.checkpoint, policy=saved, prevent_cse=False)
  def block(p, x):
    return jnp.tanh(checkpoint_name(jnp.sin(x @ p["a"]), "hidden") @ p["b"]) + x

  dots = jax.checkpoint(
    lambda p, x: jnp.sin(x @ p) @ p.T, policy=jax.checkpoint_policies.dots_saveable
  )
  model = lambda p, x: dots(p["tied"], block(p, x))
  return (
    scored(model),
    {"a": draw(4, 3), "b": draw(3, 4), "tied": draw(4, 3)},
    draw(N, 3, 4),
    draw.labels,
  )


@case
def checkpoint_that_returns_a_param(draw):
  @jax.checkpoint
  def block(p, x):
    return jnp.tanh(x @ p["w"]), p["v"], p["v"] * 2.0

  def model(p, x):
    y, v, twice = block(p, x)
    return y @ v + x[..., :3] @ twice

  return scored(model), {"w": draw(4, 3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def cond_on_a_constant(draw):
  flag = np.array(True)

  def model(p, x):
    return lax.cond(flag, lambda p, x: jnp.tanh(x @ p["a"]), lambda p, x: x @ p["a"] @ p["b"], p, x)

  return scored(model), {"a": draw(4, 3), "b": draw(3, 3)}, draw(N, 3, 4), draw.labels


@case
def cond_on_a_constant_not_taken(draw):
  # The branch that is not taken has no finite derivative.
  flag = np.array(False)
  model = lambda p, x: lax.cond(flag, lambda p, x: jnp.sqrt(0 * x) @ p, lambda p, x: x @ p, p, x)
  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def cond_on_a_param(draw):
  def model(p, x):
    return lax.cond(jnp.sum(p["a"]) > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x @ p["b"], x)

  return scored(model), {"a": 1 + draw(4, 3), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def cond_with_a_leaf_read_whole_and_in_slices(draw):
  whole = lambda p, x: jnp.tanh(x @ p)[..., :3]
  sliced = lambda p, x: (x @ p[:, :3]) * (x @ p[:, 3:])
  either = lambda flag, p, x: lax.cond(np.array(flag), whole, sliced, p, x)
  model = lambda p, x: either(True, p["a"], x) + either(False, p["b"], x)
  return scored(model), {"a": draw(4, 6), "b": draw(4, 6)}, draw(N, 2, 4), draw.labels


@case
def switch_on_a_constant(draw):
  which = np.array(1)
  branches = [
    lambda p, x: x @ p["a"],
    lambda p, x: jnp.sin(x @ p["b"]),
    lambda p, x: x @ (p["a"] + p["b"]),
  ]
  model = lambda p, x: lax.switch(which, branches, p, x)
  return scored(model), {"a": draw(4, 3), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def gradient_of_the_model_in_the_loss(draw):
  def loss(p, x, y):
    energy = lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]))
    return score(jax.vmap(jax.grad(energy))(x), y)

  return loss, {"a": draw(4, 3), "b": draw(3), "c": draw(3, 2)}, draw(N, 4), draw.labels


@case
def gradient_step_inside_the_model(draw):
  def loss(p, x, y):
    def one(x, y):
      inner = lambda w: jnp.sum((x["support"] @ w - p["target"]) ** 2)
      adapted = p["w"] - 0.1 * jax.grad(inner)(p["w"])
      return score((x["query"] @ adapted)[None], y[None])[0]

    return jax.vmap(one)(x, y)

  params = {"w": draw(3, 2), "target": draw(4, 2)}
  return loss, params, {"support": draw(N, 4, 3), "query": draw(N, 2, 3)}, draw.labels


@case(concrete=True)
def debug_callback_inside(draw):
  def model(p, x):
    y = x @ p
    jax.debug.callback(lambda y: None, y)
    return y

  return scored(model), draw(4, 3), draw(N, 4), draw.labels


@case
def random_numbers_of_each_example(draw):
  def model(p, x):
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), x["seed"]))
    noise = jax.random.normal(key, (3,), np.float32)
    mean, log_std = jnp.split(x["x"] @ p["encode"], 2)
    return (mean + jnp.exp(0.3 * log_std) * noise) @ p["decode"]

  params, inputs = (
    {"encode": draw(4, 6), "decode": draw(3, 4)},
    {"x": draw(N, 4), "seed": draw.ints(99, N)},
  )
  return one_by_one(model), params, inputs, draw.labels


# --- loops


def _layers(draw, layers=3, width=4):
  return {
    "w": draw(layers, width, width),
    "b": draw(layers, width),
    "v": draw(layers, width, width),
  }


def _block(p, x):
  return x + jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


@case(concrete=True)
def scan_over_layers_rematerialised(draw):
  model = lambda p, x: lax.scan(jax.checkpoint(lambda x, p: (_block(p, x), None)), x, p)[0]
  return scored(model), _layers(draw), draw(N, 3, 4), draw.labels


@case
def scan_that_returns_every_layer(draw):
  def model(p, x):
    end, every = lax.scan(lambda x, p: (_block(p, x), jnp.sin(x @ p["v"])), x, p)
    return jnp.moveaxis(every, 0, 1).sum(1) * end

  return scored(model), _layers(draw), draw(N, 2, 4), draw.labels


@case
def scan_that_returns_its_params(draw):
  def model(p, x):
    end, (w, b) = lax.scan(lambda x, p: (_block(p, x), (p["w"], 2 * p["b"])), x, p)
    return end @ w[1] + b[0]

  return scored(model), _layers(draw), draw(N, 2, 4), draw.labels


@case
def scan_over_rearranged_params(draw):
  model = lambda p, x: lax.scan(
    lambda x, w: (jnp.tanh(x @ w.T), None), x, 0.5 * p.transpose(2, 0, 1)[::-1]
  )[0]
  return scored(model), draw(4, 4, 3), draw(N, 2, 4), draw.labels


@case
def scan_over_parts_of_a_stack(draw):
  run = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]
  return (
    scored(lambda p, x: run(p[2:], jnp.sin(run(p[:2], x)))),
    draw(4, 4, 4),
    draw(N, 3, 4),
    draw.labels,
  )


@case
def scan_with_a_shared_param(draw):
  def model(p, x):
    step = lambda x, w: (jnp.tanh(x @ w + x @ p["shared"]), None)
    return lax.scan(step, x, p["w"])[0]

  return scored(model), {"w": draw(3, 4, 4), "shared": draw(4, 4)}, draw(N, 2, 4), draw.labels


@case
def scan_whose_branch_depends_on_the_iteration(draw):
  # The branch that is not taken has no finite derivative.
  def model(p, x):
    def step(carry, w):
      x, index = carry
      x = lax.cond(index > 0, lambda x: jnp.tanh(x @ w) / index, lambda x: jnp.sin(x @ w), x)
      return (x, index + 1), None

    return lax.scan(step, (x, np.int32(0)), p)[0][0]

  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def scan_nested(draw):
  def model(p, x):
    inner = lambda x, w: (jnp.tanh(x @ w), None)
    outer = lambda x, p: (lax.scan(inner, x @ p["v"], p["w"])[0], None)
    return lax.scan(outer, x, p)[0]

  return scored(model), {"v": draw(2, 4, 4), "w": draw(2, 3, 4, 4)}, draw(N, 2, 4), draw.labels


@case
def scan_over_tables(draw):
  def model(p, x):
    step = lambda h, table: (jnp.tanh(h + table[x]), None)
    return lax.scan(step, jnp.zeros((*x.shape, 3)), p)[0]

  return scored(model), draw(2, 5, 3), draw.ints(5, N, 4), draw.labels


@case
def scan_of_length_zero_and_one(draw):
  model = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]
  both = lambda p, x: model(p["one"], model(p["none"], x))
  return scored(both), {"none": draw(0, 4, 4), "one": draw(1, 4, 4)}, draw(N, 2, 4), draw.labels


@case
def recurrent(draw):
  def model(p, x):
    step = lambda h, row: (jnp.tanh(row @ p["in"] + h @ p["hidden"] + p["b"]), None)
    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 3)).astype(x.dtype), x.swapaxes(0, 1))
    return h @ p["out"]

  params = {"in": draw(4, 3), "hidden": draw(3, 3), "b": draw(3), "out": draw(3, 3)}
  return classified(model), params, draw(N, 4, 4), draw.labels


@case
def fori_loop_that_indexes_a_stack(draw):
  model = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p[i]), x)
  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


# --- losses


def _logits(p, x):
  return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def _mlp_params(draw, inputs=4, classes=3):
  return {"a": draw(inputs, 5), "b": draw(5), "c": draw(5, classes)}


@case
def softmax_cross_entropy_of_a_sure_model(draw):
  loss = lambda p, x, y: mj.softmax_cross_entropy(10 * _logits(p, x), y)
  return loss, _mlp_params(draw), draw(N, 4), draw.labels


@case(concrete=True)
def inputs_in_a_tree(draw):
  def loss(p, x, y):
    image, (token, number) = x["image"], x["rest"]
    h = convolve(image, p["kernel"]).mean((1, 2)) + p["table"][token] + number[:, None] * p["scale"]
    return mj.softmax_cross_entropy(jnp.tanh(h) @ p["w"], y["class"]) + (h[:, 0] - y["number"]) ** 2

  params = {"kernel": draw(2, 2, 1, 4), "table": draw(5, 4), "scale": draw(4), "w": draw(4, 3)}
  inputs = {"image": draw(N, 3, 3, 1), "rest": (draw.ints(5, N), draw(N))}
  return loss, params, inputs, {"class": draw.labels, "number": draw(N)}


# --- whole models


def _eval_batch_norm(draw, width):
  mean, variance = draw(width), 0.5 + abs(draw(width))
  return lambda p, x: (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


@case
def residual_block(draw):
  norms = [_eval_batch_norm(draw, 4) for _ in range(2)]

  def model(p, x):
    x = convolve(x, p["stem"], padding="SAME")
    y = jax.nn.relu(
      norms[0](p["norm0"], convolve(x, p["a"], window_strides=(2, 2), padding="SAME"))
    )
    y = norms[1](p["norm1"], convolve(y, p["b"], padding="SAME"))
    y = jax.nn.relu(y + convolve(x, p["shortcut"], window_strides=(2, 2)))
    return y.mean((1, 2)) @ p["head"]

  params = {
    "stem": draw(3, 3, 2, 4),
    "a": draw(3, 3, 4, 4),
    "b": draw(3, 3, 4, 4),
    "shortcut": draw(1, 1, 4, 4),
  }
  params |= {f"norm{i}": {"scale": 1 + draw(4), "bias": draw(4)} for i in range(2)} | {
    "head": draw(4, 3)
  }
  return classified(model), params, draw(N, 4, 4, 2), draw.labels


def _attention_params(draw, width=4, heads=2, size=2):
  projections = {name: draw(width, heads, size) for name in "qkv"}
  norms = {f"scale{i}": 1 + draw(width) for i in (1, 2)} | {f"bias{i}": draw(width) for i in (1, 2)}
  return {
    **projections,
    "o": draw(heads, size, width),
    **norms,
    "up": draw(width, 6),
    "down": draw(6, width),
  }


def _attend(p, x, bias: Any = 0.0):
  q, k, v = (jnp.einsum("...td,dhe->...hte", x, p[name]) for name in "qkv")
  weights = jax.nn.softmax(jnp.einsum("...hte,...hse->...hts", q, k) * 0.7 + bias)
  return jnp.einsum("...hts,...hse,hed->...td", weights, v, p["o"])


def _transformer_block(p, x, bias: Any = 0.0):
  x = x + _attend(p, layer_norm(x, p["scale1"], p["bias1"]), bias)
  return x + jax.nn.gelu(layer_norm(x, p["scale2"], p["bias2"]) @ p["up"]) @ p["down"]


@case
def vision_transformer(draw):
  def model(p, x):
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, -1, 4 * c)
    token = jnp.broadcast_to(p["token"], (n, 1, 4))
    x = jnp.concatenate([token, patches @ p["embed"]], axis=1) + p["position"]
    return layer_norm(_transformer_block(p["block"], x))[:, 0] @ p["head"]

  params = {"token": draw(4), "embed": draw(8, 4), "position": draw(5, 4), "head": draw(4, 3)}
  return (
    classified(model),
    params | {"block": _attention_params(draw)},
    draw(N, 4, 4, 2),
    draw.labels,
  )


@case
def language_model_scanned_and_rematerialised(draw):
  def loss(p, x, y):
    causal = np.where(np.tri(3), 0, -1e9).astype(np.float32)
    step = jax.checkpoint(lambda x, p: (_transformer_block(p, x, causal), None), prevent_cse=False)
    h, _ = lax.scan(step, p["table"][x[:, :-1]] + p["position"], p["blocks"])
    log_p = jax.nn.log_softmax(layer_norm(h) @ p["table"].T)
    return -jnp.sum(jnp.take_along_axis(log_p, x[:, 1:, None], -1)[..., 0] * (y[:, None] + 1), -1)

  blocks = jax.tree.map(
    lambda *leaves: np.stack(leaves), *(_attention_params(draw) for _ in range(2))
  )
  return (
    loss,
    {"table": draw(6, 4), "position": draw(3, 4), "blocks": blocks},
    draw.ints(6, N, 4),
    draw.labels,
  )


@case
def linen_module(draw):
  class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
      x = linen.relu(linen.Conv(4, (3, 3), strides=2)(x))
      x = linen.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
      x = linen.GroupNorm(2)(x).reshape(x.shape[0], -1, 4)
      x = x + linen.MultiHeadDotProductAttention(2, use_bias=False)(linen.LayerNorm()(x))
      x = linen.WeightNorm(linen.Dense(5))(x)
      return linen.Dense(3)(linen.RMSNorm()(x).mean(1))

  module, inputs = Model(), draw(N, 4, 4, 2)
  params = draw.like(module.init, jax.random.key(0), inputs)["params"]
  return classified(lambda p, x: module.apply({"params": p}, x)), params, inputs, draw.labels


@case
def linen_scan_with_remat(draw):
  class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
      return x + linen.Dense(4)(linen.tanh(linen.Dense(3)(linen.LayerNorm()(x)))), None

  stack = linen.scan(
    linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
  )
  module, inputs = stack(), draw(N, 3, 4)
  params = draw.like(module.init, jax.random.key(0), inputs, None)["params"]
  return scored(lambda p, x: module.apply({"params": p}, x, None)[0]), params, inputs, draw.labels


@case
def nnx_module(draw):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
      self.embed = nnx.Embed(3, 4, rngs=rngs)
      self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, image, kind):
      return self.out(nnx.relu(self.norm(self.conv(image))).mean((1, 2)) * self.embed(kind))

  graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
  model = lambda p, x: nnx.merge(graph, p, rest)(x["image"], x["kind"])
  params = jax.tree.map(np.asarray, params)
  return (
    classified(model),
    params,
    {"image": draw(N, 4, 4, 2), "kind": draw.ints(3, N)},
    draw.labels,
  )


@case
def equinox_module(draw):
  class Model(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    out: eqx.nn.MLP

    def __init__(self, key):
      a, b, c = jax.random.split(key, 3)
      self.conv = eqx.nn.Conv2d(2, 3, 3, key=a)
      self.norm = eqx.nn.LayerNorm(3)
      self.cell = eqx.nn.GRUCell(3, 4, key=b)
      self.out = eqx.nn.MLP(4, 3, 5, 1, key=c)

    def __call__(self, image):
      tokens = jax.vmap(self.norm)(self.conv(image).reshape(3, -1).T)
      h, _ = lax.scan(
        lambda h, token: (self.cell(token, h), None), jnp.zeros(4, image.dtype), tokens
      )
      return self.out(h)

  shapes, static = eqx.partition(
    eqx.filter_eval_shape(Model, jax.random.key(0)), lambda x: hasattr(x, "shape")
  )
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
  model = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
  return classified(model), params, draw(N, 2, 4, 4), draw.labels


@case
def haiku_module(draw):
  def forward(x):
    x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x))
    x = hk.LayerNorm(-1, True, True)(x)
    table = hk.get_parameter("table", [4, 4], init=hk.initializers.RandomNormal())
    return hk.Linear(3)(jnp.tanh(hk.Flatten()(x @ table)))

  transformed, inputs = hk.without_apply_rng(hk.transform(forward)), draw(N, 4, 4, 2)
  params = draw.like(transformed.init, jax.random.key(0), inputs)
  return classified(transformed.apply), params, inputs, draw.labels


# --- what else jax has


@case
def custom_vjp_with_integers(draw):
  @jax.custom_vjp
  def pick(table, index):
    return table[index]

  def backward(kept, g):
    rows, index = kept
    return 2 * jnp.zeros((rows, g.shape[-1]), g.dtype).at[index].add(g), None

  pick.defvjp(lambda table, index: (table[index], (table.shape[0], index)), backward)
  return one_by_one(lambda p, x: pick(p, x)), draw(5, 3), draw.ints(5, N, 4), draw.labels


# Stands for a kernel that is written for one platform: no other lowers it.
on_tpu_only = jex.Primitive("on_tpu_only")
on_tpu_only.def_abstract_eval(lambda x: x)
ad.deflinear2(on_tpu_only, lambda g, x: [g])
batching.defvectorized(on_tpu_only)


@case
def barriers_and_platforms(draw):
  def model(p, x):
    tpu, other = (lambda x, w: on_tpu_only.bind(x @ w)), (lambda x, w: x @ w)
    y = lax.platform_dependent(x, p["w"], tpu=tpu, default=other)
    return jnp.tanh(y) @ lax.optimization_barrier(p["v"])

  return scored(model), {"w": draw(4, 3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def mutable_array_inside(draw):
  def model(p, x):
    total = jax.new_ref(jnp.zeros_like(x @ p["a"]))
    total[...] += jnp.tanh(x @ p["a"])
    total[...] *= p["scale"]
    return total[...] @ p["b"]

  return (
    one_by_one(model),
    {"a": draw(4, 3), "scale": draw(3), "b": draw(3, 2)},
    draw(N, 4),
    draw.labels,
  )


@case
def ragged_experts(draw):
  def model(p, x):
    order = jnp.argsort(x["expert"].reshape(-1))
    sizes = jnp.bincount(x["expert"].reshape(-1), length=2).astype(np.int32)
    y = lax.ragged_dot(x["x"].reshape(-1, 3)[order], p, sizes)
    return y[jnp.argsort(order)].reshape(*x["x"].shape[:2], -1)

  return (
    scored(model),
    draw(2, 3, 4),
    {"x": draw(N, 4, 3), "expert": draw.ints(2, N, 4)},
    draw.labels,
  )


# --- random graphs: functions of the state (tokens, width), of a source of new params, and of
# --- those made so far

ACTIVATIONS = (jnp.tanh, jnp.sin, jax.nn.silu)


def _tied(h, new, made, size):
  for p in made[size % 3 :]:
    if p.ndim == 2 and h.shape[1] in p.shape:
      return jnp.tanh(h @ (p if p.shape[0] == h.shape[1] else p.T))
  return h


def _slices(h, new, made, size):
  w = new(h.shape[1], 2 * size)
  return (h @ w[:, :size]) + jnp.sin(h @ w[:, size:])


def _overlapping_slices(h, new, made, size):
  w = new(h.shape[1], size + 1)
  return (h @ w[:, 1:]) + jnp.sin(h @ w[:, :-1])


def _scanned(h, new, made, size):
  return lax.scan(
    lambda h, w: (jnp.tanh(h @ w) + 0.3 * h, None), h, new(2, h.shape[1], h.shape[1])
  )[0]


def _rematerialised(h, new, made, size):
  return jax.checkpoint(lambda a, b, h: h + jnp.tanh(h @ a) @ b)(
    new(h.shape[1], size), new(size, h.shape[1]), h
  )


def _there_and_back(h, new, made, size):
  w = new(h.shape[1], size)
  return jnp.tanh(h @ w) @ w.T


OPERATIONS = {
  "dense": lambda h, new, made, size: h @ new(h.shape[1], size),
  "dense transposed": lambda h, new, made, size: h @ new(size, h.shape[1]).T,
  "dense scaled": lambda h, new, made, size: h @ (-0.5 * new(h.shape[1], size)),
  "tied": _tied,
  "stopped": lambda h, new, made, size: (
    h + 0.1 * jnp.sum(lax.stop_gradient(made[0])) if made else h
  ),
  "bias": lambda h, new, made, size: h + new(h.shape[1]),
  "scale": lambda h, new, made, size: h * new(h.shape[1]) * new(),
  "activation": lambda h, new, made, size: ACTIVATIONS[size % 3](h),
  "residual": lambda h, new, made, size: h + jnp.tanh(h @ new(h.shape[1], h.shape[1])),
  "slices": _slices,
  "overlapping slices": _overlapping_slices,
  "scan": _scanned,
  "remat": _rematerialised,
  "jit": lambda h, new, made, size: jax.jit(jnp.dot)(h, new(h.shape[1], size)),
  "there and back": _there_and_back,
  "prompt": lambda h, new, made, size: jnp.concatenate([new(1, h.shape[1]), h]),
  "mix tokens": lambda h, new, made, size: new(size, h.shape[0]) @ h,
  "pool": lambda h, new, made, size: jnp.mean(h, 0, keepdims=True),
  "convolution": lambda h, new, made, size: convolve(
    h[None], new(2, h.shape[1], size), _NWC, padding="SAME"
  )[0],
}


def graph(
  program: list[tuple[str, int]], tokens: int, width: int, seed: int
) -> tuple[Any, Any, Any, Any]:
  """A model that applies the operations one after another, as a case."""
  draw = Draw(str(seed))

  def apply(h, take):
    made = []

    def new(*shape):
      made.append(jnp.asarray(take(*shape)))
      return made[-1]

    for operation, size in [*program, ("dense", 2)]:
      h = OPERATIONS[operation](h, new, made, size)
    return h

  params: list[np.ndarray] = []
  inputs = draw(N, tokens, width)

  def take_new(*shape):
    params.append(draw(*shape))
    return params[-1]

  jax.eval_shape(lambda x: apply(x, take_new), inputs[0])

  def model(p, x):
    given = iter(p)
    return apply(x, lambda *shape: next(given))

  return one_by_one(model), params, inputs, draw.labels
