"""Small models that use params in every way we know, for `test_fisher_exact.py`.

Each case is a function of a `Draw` that returns (loss_fn, params, inputs, labels), all arrays in NumPy and float32. What a
case does with its result is mostly beside the point: `score` turns any array into one number per example.
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
from jax.experimental import sparse

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


@case
def dense_of_one_example(draw):
  return (
    one_by_one(lambda p, x: p["w"] @ x + p["b"]),
    {"w": draw(3, 4), "b": draw(3)},
    draw(N, 4),
    draw.labels,
  )


@case
def dense_to_a_scalar(draw):
  return lambda w, x, y: (x @ w - y) ** 2, draw(4), draw(N, 4), draw.labels


EINSUMS = {  # (equation, shape of the data, shape of the param)
  "param_first": ("fd,ntd->ntf", (4, 3), (5, 3)),
  "heads_out": ("btd,dhe->bthe", (4, 5), (5, 2, 3)),
  "heads_in": ("bthe,hed->btd", (4, 2, 3), (2, 3, 5)),
  "heads_scrambled": ("hed,btd->ehbt", (4, 5), (2, 3, 5)),
  "experts": ("netd,edf->netf", (2, 4, 3), (2, 3, 4)),
  "experts_inside": ("netd,def->ntfe", (2, 4, 3), (3, 2, 4)),
  "experts_one_position": ("ned,edf->nef", (2, 3), (2, 3, 4)),
  "two_batch_axes": ("nabtc,bacd->natbd", (2, 3, 4, 2), (3, 2, 2, 3)),
  "two_contracted_axes": ("nijt,jik->ntk", (2, 3, 4), (3, 2, 5)),
  "outer": ("nt,k->ntk", (4,), (3,)),
  "vector": ("ntd,d->nt", (4, 3), (3,)),
  "whole": ("nij,ij->n", (4, 3), (4, 3)),
  "only_batch_axes": ("nij,ij->nij", (4, 3), (4, 3)),
  "param_summed_alone": ("nij,jk->ni", (4, 3), (3, 2)),
  "diagonal_of_param": ("ni,ii->ni", (3,), (3, 3)),
  "matrix_at_every_place": ("nhwc,hwcd->nhwd", (2, 3, 4), (2, 3, 4, 3)),
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
  case(partial(_einsum, *_arguments), name=f"einsum_{_name}", concrete=_name == "experts")


@case
def einsum_of_three(draw):
  model = lambda p, x: jnp.einsum("nti,ij,jk->ntk", x, p["a"], p["b"])
  return scored(model), {"a": draw(3, 4), "b": draw(4, 2)}, draw(N, 4, 3), draw.labels


@case
def low_rank_update_of_a_constant(draw):
  frozen = draw(4, 3)
  model = lambda p, x: x @ (frozen + p["down"] @ p["up"])
  return scored(model), {"down": draw(4, 2), "up": draw(2, 3)}, draw(N, 5, 4), draw.labels


@case
def bilinear(draw):
  model = lambda p, x: jnp.einsum("ni,kij,nj->nk", x["a"], p, x["b"])
  return scored(model), draw(3, 4, 2), {"a": draw(N, 4), "b": draw(N, 2)}, draw.labels


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


@case(concrete=True)
def used_twice(draw):
  return scored(lambda w, x: jnp.tanh(x @ w) @ w), draw(4, 4), draw(N, 3, 4), draw.labels


@case
def used_twice_once_transposed(draw):
  return scored(lambda w, x: jnp.tanh(x @ w) @ w.T), draw(4, 3), draw(N, 4), draw.labels


@case
def used_on_two_inputs(draw):
  model = lambda w, x: (x["a"] @ w) * (x["b"] @ w)
  return scored(model), draw(4, 3), {"a": draw(N, 4), "b": draw(N, 2, 4)[:, 0]}, draw.labels


@case
def used_and_penalised(draw):
  loss = lambda w, x, y: score(x @ w, y) + (1.0 + x[:, 0] ** 2) * jnp.sum(w**2)
  return loss, draw(4, 3), draw(N, 4), draw.labels


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


@case
def gate_of_two_paths(draw):
  model = lambda p, x: jax.nn.sigmoid(x @ p["gate"]) * (x @ p["value"])
  return scored(model), {"gate": draw(4, 3), "value": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def outer_product_of_params(draw):
  model = lambda p, x: x @ (p["a"][:, None] * p["b"])
  return scored(model), {"a": draw(4), "b": draw(3)}, draw(N, 2, 4), draw.labels


# --- convolutions

_NHWC, _NWC, _NDHWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")
CONVOLUTIONS = {  # (shape of one example, shape of the kernel, layout, settings)
  "1d": ((7, 3), (3, 3, 4), _NWC, {}),
  "2d": ((5, 4, 3), (3, 2, 3, 4), _NHWC, {}),
  "2d_same": ((5, 4, 3), (3, 2, 3, 4), _NHWC, {"padding": "SAME"}),
  "3d": ((3, 4, 3, 2), (2, 2, 2, 2, 3), _NDHWC, {"window_strides": (1, 2, 1), "padding": "SAME"}),
  "stride": ((6, 5, 2), (3, 3, 2, 3), _NHWC, {"window_strides": (2, 2)}),
  "side_by_side": ((6, 9, 2), (2, 3, 2, 3), _NHWC, {"window_strides": (2, 3)}),
  "side_by_side_leaves_a_rest": (
    (5, 8, 4),
    (2, 3, 2, 6),
    _NHWC,
    {"window_strides": (2, 3), "feature_group_count": 2},
  ),
  "side_by_side_padded": (
    (3, 8, 5),
    (2, 4, 3, 3),
    ("NCHW", "HOIW", "NWHC"),
    {"window_strides": (2, 3), "padding": "SAME"},
  ),
  "stride_leaves_a_rest": ((8, 7, 2), (2, 3, 2, 3), _NHWC, {"window_strides": (3, 3)}),
  "even_kernel_same_stride": (
    (5, 6, 2),
    (2, 4, 2, 3),
    _NHWC,
    {"window_strides": (2, 2), "padding": "SAME"},
  ),
  "stride_beyond_kernel": ((7, 7, 2), (1, 2, 2, 3), _NHWC, {"window_strides": (3, 3)}),
  "kernel_dilation": ((7, 6, 2), (3, 2, 2, 3), _NHWC, {"rhs_dilation": (2, 3)}),
  "input_dilation": (
    (4, 3, 2),
    (3, 3, 2, 3),
    _NHWC,
    {"padding": ((0, 1), (2, 0)), "lhs_dilation": (2, 3)},
  ),
  "asymmetric_padding": ((4, 4, 2), (3, 3, 2, 3), _NHWC, {"padding": ((0, 2), (3, 1))}),
  # Not (-1, 1): negative low padding with at most as much high padding reads out of bounds in XLA (openxla/xla#48713).
  "negative_padding": ((6, 7, 2), (2, 3, 2, 3), _NHWC, {"padding": ((-1, 2), (-1, -2))}),
  "negative_padding_of_dilated": (
    (4, 3, 2),
    (2, 2, 2, 3),
    _NHWC,
    {"padding": ((-2, 0), (1, -1)), "lhs_dilation": (2, 2)},
  ),
  "groups": ((4, 4, 4), (3, 3, 2, 6), _NHWC, {"feature_group_count": 2, "padding": "SAME"}),
  "depthwise": ((4, 4, 3), (3, 3, 1, 3), _NHWC, {"feature_group_count": 3}),
  "depthwise_multiplied": (
    (4, 4, 3),
    (3, 3, 1, 6),
    _NHWC,
    {"feature_group_count": 3, "padding": "SAME"},
  ),
  "nchw": ((3, 5, 4), (4, 3, 2, 3), ("NCHW", "OIHW", "NCHW"), {"padding": "SAME"}),
  "nchw_groups_1d": ((4, 6), (6, 2, 3), ("NCH", "OIH", "NCH"), {"feature_group_count": 2}),
  "mixed_layouts": (
    (3, 5, 4),
    (2, 4, 3, 3),
    ("NCHW", "HOIW", "NWHC"),
    {"window_strides": (1, 2), "padding": "SAME"},
  ),
  "one_by_one": ((3, 4, 2), (1, 1, 2, 3), _NHWC, {}),
  "one_by_one_stride": ((4, 5, 2), (1, 1, 2, 3), _NHWC, {"window_strides": (2, 2)}),
  "whole_image": ((3, 4, 2), (3, 4, 2, 5), _NHWC, {}),
  "larger_than_image": ((2, 2, 2), (4, 3, 2, 3), _NHWC, {"padding": ((2, 1), (1, 1))}),
  "everything": (
    (6, 5, 4),
    (2, 3, 2, 6),
    _NHWC,
    {
      "window_strides": (2, 1),
      "padding": ((1, 2), (3, -1)),
      "lhs_dilation": (1, 2),
      "rhs_dilation": (3, 2),
      "feature_group_count": 2,
    },
  ),
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
    concrete=_name in ("groups", "whole_image"),
  )


@case
def conv_transpose(draw):
  model = lambda w, x: lax.conv_transpose(x, w, (2, 3), "SAME", dimension_numbers=_NHWC)
  return scored(model), draw(3, 2, 2, 3), draw(N, 3, 2, 2), draw.labels


@case
def conv_transpose_of_the_forward_kernel(draw):
  model = lambda w, x: lax.conv_transpose(
    x, w, (2, 2), "VALID", dimension_numbers=_NHWC, transpose_kernel=True
  )
  return scored(model), draw(3, 2, 3, 2), draw(N, 3, 2, 2), draw.labels


@case
def conv_flipped_kernel(draw):
  model = lambda w, x: convolve(x, lax.rev(w, (0, 1)), padding="SAME")
  return scored(model), draw(3, 3, 2, 3), draw(N, 4, 4, 2), draw.labels


@case
def conv_of_frames(draw):
  def model(w, x):
    y = convolve(x.reshape(-1, *x.shape[2:]), w, padding="SAME")
    return y.reshape(*x.shape[:2], -1)

  return scored(model), draw(3, 3, 2, 3), draw(N, 3, 4, 3, 2), draw.labels


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


@case
def conv_with_a_kernel_predicted_from_data(draw):
  def model(p, x):
    kernel = jnp.tanh(x.mean((0, 1)) @ p["to_kernel"]).reshape(3, 3, 2, 3) + p["kernel"]
    return convolve(x[None], kernel)

  return (
    one_by_one(model),
    {"to_kernel": draw(2, 54), "kernel": draw(3, 3, 2, 3)},
    draw(N, 4, 4, 2),
    draw.labels,
  )


@case
def conv_ensemble_by_vmap_over_kernels(draw):
  model = lambda w, x: jnp.moveaxis(jax.vmap(lambda kernel: convolve(x, kernel))(w), 0, 1)
  return scored(model), draw(2, 3, 3, 2, 3), draw(N, 4, 4, 2), draw.labels


@case
def conv_with_its_own_kernel_at_every_place(draw):
  def model(w, x):
    return lax.conv_general_dilated_local(x, w, (1, 1), "VALID", (3, 3), dimension_numbers=_NHWC)

  return scored(model), draw(2, 2, 18, 3), draw(N, 4, 4, 2), draw.labels


@case
def conv_unfolded(draw):
  def model(w, x):
    return lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=_NHWC) @ w

  return scored(model), draw(18, 3), draw(N, 4, 4, 2), draw.labels


@case
def conv_kernel_used_at_two_dilations(draw):
  model = lambda w, x: (
    convolve(x, w, padding="SAME") + convolve(x, w, padding="SAME", rhs_dilation=(2, 2))
  )
  return scored(model), draw(3, 3, 2, 3), draw(N, 5, 5, 2), draw.labels


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
def position_embedding(draw):
  model = lambda p, x: jnp.tanh(x + p["position"][: x.shape[1]]) @ p["w"]
  return scored(model), {"position": draw(6, 3), "w": draw(3, 2)}, draw(N, 4, 3), draw.labels


@case
def prompt_tokens_before_the_data(draw):
  def model(p, x):
    prompt = jnp.broadcast_to(p["prompt"], (len(x), *p["prompt"].shape))
    return jnp.tanh(jnp.concatenate([prompt, x], axis=1)) @ p["w"]

  return scored(model), {"prompt": draw(2, 3), "w": draw(3, 4)}, draw(N, 4, 3), draw.labels


@case
def image_border_learnt(draw):
  def model(p, x):
    framed = jnp.zeros((len(x), 5, 5, 2)).astype(x.dtype) + p["image"]
    return convolve(framed.at[:, 1:4, 1:4].set(x), p["kernel"])

  return (
    scored(model),
    {"image": draw(5, 5, 2), "kernel": draw(3, 3, 2, 3)},
    draw(N, 3, 3, 2),
    draw.labels,
  )


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


@case
def distances_to_learnt_centres(draw):
  def model(p, x):
    squared = jnp.sum((x[:, None] - p["centres"]) ** 2, -1)
    return jnp.exp(-squared * jnp.exp(p["log_width"])) @ p["w"]

  return (
    scored(model),
    {"centres": draw(3, 4), "log_width": draw(3), "w": draw(3, 2)},
    draw(N, 4),
    draw.labels,
  )


@case
def linear_solve_with_a_param(draw):
  model = lambda p, x: jnp.linalg.solve(p["a"] + 3 * np.eye(3, dtype=np.float32), (x @ p["b"]).T).T
  return scored(model), {"a": draw(3, 3), "b": draw(4, 3)}, draw(N, 4), draw.labels


@case
def circulant_by_fourier_transform(draw):
  model = lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p), n=6)
  return scored(model), draw(6), draw(N, 2, 6), draw.labels


@case
def complex_weights_from_two_leaves(draw):
  def model(p, x):
    y = jnp.einsum("nkc,kcd->nkd", jnp.fft.rfft(x, axis=1), lax.complex(p["re"], p["im"]))
    return jnp.fft.irfft(y, n=6, axis=1)

  return scored(model), {"re": draw(4, 2, 3), "im": draw(4, 2, 3)}, draw(N, 6, 2), draw.labels


# --- lookups


@case
def lookup(draw):
  return scored(lambda p, x: jnp.tanh(p[x])), draw(7, 3), draw.ints(7, N, 4), draw.labels


@case(concrete=True)
def lookup_repeated_in_an_example(draw):
  model = lambda p, x: jnp.tanh(p["table"][x] @ p["w"])
  return scored(model), {"table": draw(4, 3), "w": draw(3, 2)}, draw.ints(2, N, 6), draw.labels


@case
def lookup_one_per_example(draw):
  return lambda p, x, y: jnp.sum((x - p[y]) ** 2, -1), draw(3, 4), draw(N, 4), draw.labels


@case
def lookup_in_two_axes_of_indices(draw):
  return scored(lambda p, x: p[x]), draw(5, 2, 3), draw.ints(5, N, 2, 3), draw.labels


@case
def lookup_in_a_vector(draw):
  return scored(lambda p, x: p[x]), draw(5), draw.ints(5, N, 6), draw.labels


@case
def lookup_negative(draw):
  return scored(lambda p, x: p[x]), draw(5, 2), draw.ints(5, N, 4, low=-5), draw.labels


@case
def lookup_take_clipped(draw):
  return (
    scored(lambda p, x: jnp.take(p, x, axis=0, mode="clip")),
    draw(4, 2),
    draw.ints(9, N, 4, low=-4),
    draw.labels,
  )


@case
def lookup_take_filled(draw):
  model = lambda p, x: jnp.take(p, x, axis=0, mode="fill", fill_value=0.5)
  return scored(model), draw(4, 2), draw.ints(9, N, 4, low=-6), draw.labels


@case
def lookup_by_numbers_beyond_int32(draw):
  filled = lambda b, x: jnp.take(b, x, axis=0, mode="fill", fill_value=0)
  model = lambda p, x: jnp.concatenate(
    [jnp.take(p["a"], x, axis=0, mode="clip"), filled(p["b"], x)], -1
  )
  indices = np.array([[1, 2**32 - 1], [0, 2**31], [3, 4], [2**31 + 2, 1], [2, 2]], np.uint32)
  return scored(model), {"a": draw(4, 2), "b": draw(4, 2)}, indices, draw.labels


@case
def lookup_take_wrapped(draw):
  return (
    scored(lambda p, x: jnp.take(p, x, axis=0, mode="wrap")),
    draw(4, 2),
    draw.ints(9, N, 4, low=-6),
    draw.labels,
  )


@case
def lookup_along_another_axis(draw):
  return (
    scored(lambda p, x: jnp.take(p, x, axis=1)[0] + p[1, x]),
    draw(2, 5, 3),
    draw.ints(5, N, 4),
    draw.labels,
  )


def _lookup_by_narrow_integers(dtype, rows, mode, draw):
  inputs = draw.ints(min(rows, np.iinfo(dtype).max + 1), N, 4)
  inputs[0, :2], inputs[1, :2] = inputs.max(), 0
  model = lambda p, x: jnp.concatenate(
    [p["a"].at[x].get(mode=mode), jnp.take(p["b"], x, 0, mode=mode)], -1
  )
  return scored(model), {"a": draw(rows, 2), "b": draw(rows, 2)}, inputs.astype(dtype), draw.labels


for _dtype, _rows, _mode in (
  (np.uint8, 256, "fill"),
  (np.uint8, 300, "clip"),
  (np.int8, 100, "fill"),
):
  _function = partial(_lookup_by_narrow_integers, _dtype, _rows, _mode)
  case(_function, name=f"lookup_by_{_dtype.__name__}_of_{_rows}")


@case
def lookup_of_no_tokens(draw):
  model = lambda p, x: x["some"] @ p["w"] + p["table"][x["none"]].sum(1)
  inputs = {"some": draw(N, 4), "none": draw.ints(3, N, 0)}
  return scored(model), {"w": draw(4, 3), "table": draw(3, 3)}, inputs, draw.labels


@case
def lookup_of_one_example(draw):
  return one_by_one(lambda p, x: jnp.tanh(p[x]).sum(0)), draw(5, 3), draw.ints(5, N, 4), draw.labels


@case
def lookup_of_single_elements(draw):
  return scored(lambda p, x: p[x[:, 0], x[:, 1]]), draw(4, 4, 2), draw.ints(4, N, 2), draw.labels


@case
def lookup_in_part_of_a_table(draw):
  return (
    scored(lambda p, x: jnp.concatenate([p[:4][x], p[4:][x] ** 2], -1)),
    draw(8, 2),
    draw.ints(4, N, 3),
    draw.labels,
  )


@case
def lookup_in_two_tables_at_once(draw):
  model = lambda p, x: jnp.concatenate([p["words"], p["extra"]])[x]
  return scored(model), {"words": draw(4, 3), "extra": draw(2, 3)}, draw.ints(6, N, 5), draw.labels


@case
def lookup_by_one_hot(draw):
  return scored(lambda p, x: jax.nn.one_hot(x, 5) @ p), draw(5, 3), draw.ints(5, N, 4), draw.labels


@case
def lookup_at_constant_places(draw):
  places = draw.ints(5, 3, 3)
  return scored(lambda p, x: x + p[places]), draw(5), draw(N, 3, 3), draw.labels


@case
def lookup_along_an_axis_per_row(draw):
  model = lambda p, x: jnp.take_along_axis(p, x, axis=1)
  return one_by_one(model), draw(3, 5), draw.ints(5, N, 3, 2), draw.labels


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
def cast_to_bfloat16_and_back(draw):
  # Plain gradients are rounded to the 8 bits of bfloat16 on their way, squared: 2**-7; ours are not.
  return (
    scored(lambda p, x: x @ p.astype(jnp.bfloat16).astype(x.dtype)),
    draw(4, 3),
    draw(N, 3, 4),
    draw.labels,
  )


@case(tolerance=2**-6, x64=False)
def dense_in_bfloat16(draw):
  # Cotangents are rounded to bfloat16 in both, in another order; 2**-8 each, a few of them, squared.
  def model(p, x):
    y = jnp.tanh(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16))
    return (y @ p["v"].astype(jnp.bfloat16)).astype(x.dtype)

  return scored(model), {"w": draw(4, 3), "b": draw(3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def cast_to_integers_and_back(draw):
  model = lambda p, x: x @ (p["w"] + (10 * p["w"]).astype(np.int32).astype(p["w"].dtype))
  return scored(model), {"w": draw(4, 3)}, draw(N, 4), draw.labels


@case
def reshaped_and_transposed(draw):
  model = lambda p, x: x @ p.reshape(2, 3, 4).transpose(2, 0, 1).reshape(4, 6)
  return scored(model), draw(6, 4), draw(N, 3, 4), draw.labels


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
def constants_divided_by_params(draw):
  return (
    scored(lambda p, x: x @ (2.0 / (p + 3.0)) + x @ (1.0 / p)),
    1 + abs(draw(4, 3)),
    draw(N, 4),
    draw.labels,
  )


@case
def scaled_down_and_up_again(draw):
  # The gradient is of order one; the square of its cotangent before the scale is not in the range of float32.
  return scored(lambda p, x: x @ (p * 1e-22) * 1e22), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def scaled_up_and_down_again(draw):
  return scored(lambda p, x: x @ (p / 1e-22) * 1e-22), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def pruned(draw):
  kept = np.asarray(draw.ints(2, 4, 3), np.float32)
  return scored(lambda p, x: x @ (p * kept)), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def pruned_by_where(draw):
  kept = draw.ints(2, 4, 3) == 1
  return scored(lambda p, x: x @ jnp.where(kept, p, 0)), draw(4, 3), draw(N, 3, 4), draw.labels


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
def slices_strided(draw):
  return (
    scored(lambda p, x: (x @ p[:, ::2]) * (x @ p[:, 1::2])),
    draw(4, 6),
    draw(N, 3, 4),
    draw.labels,
  )


@case
def slices_of_slices(draw):
  def model(p, x):
    left, right = p[:, :4], p[:, 4:]
    return (x @ left[:2]) * (x @ left[2:]) + x @ right[1:3]

  return scored(model), draw(4, 8), draw(N, 3, 2), draw.labels


@case
def slice_and_the_whole(draw):
  return (
    scored(lambda p, x: x @ p + (x[..., :2] @ p[:2]) ** 2),
    draw(4, 3),
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
def split_with_one_part_used_twice(draw):
  def model(p, x):
    a, b = jnp.split(p, 2)
    return jnp.tanh(x @ a) @ a.T + x @ b[:, :2] @ b[:, :2].T

  return scored(model), draw(8, 3), draw(N, 2, 4), draw.labels


@case
def concatenated(draw):
  model = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1)
  return scored(model), {"a": draw(4, 2), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def concatenated_one_used_elsewhere(draw):
  model = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1) + jnp.sum(jnp.tanh(x @ p["a"]))
  return one_by_one(model), {"a": draw(4, 2), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


@case
def concatenated_with_itself(draw):
  return (
    scored(lambda p, x: x @ jnp.concatenate([p, -p], axis=1)),
    draw(4, 2),
    draw(N, 3, 4),
    draw.labels,
  )


@case
def concatenated_with_constants(draw):
  fixed = draw(4, 2)
  model = lambda p, x: x @ jnp.concatenate([p, fixed, np.ones((4, 1), np.float32)], axis=1)
  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def stacked(draw):
  model = lambda p, x: jnp.einsum("ntd,kdf->nktf", x, jnp.stack([p["a"], p["b"].T, 2 * p["c"]]))
  return (
    scored(model),
    {"a": draw(4, 3), "b": draw(3, 4), "c": draw(4, 3)},
    draw(N, 2, 4),
    draw.labels,
  )


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
def stop_gradient_on_a_leaf(draw):
  model = lambda p, x: jnp.tanh(x @ p["w"]) @ lax.stop_gradient(p["v"])
  return scored(model), {"w": draw(4, 3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def stop_gradient_on_part_of_a_leaf(draw):
  model = lambda p, x: (x @ p[:, :3]) * (x @ lax.stop_gradient(p[:, 3:]))
  return scored(model), draw(4, 6), draw(N, 3, 4), draw.labels


@case
def stop_gradient_on_everything(draw):
  return scored(lambda p, x: x @ lax.stop_gradient(p)), draw(4, 3), draw(N, 4), draw.labels


@case
def quantised_straight_through(draw):
  model = lambda p, x: x @ (p + lax.stop_gradient(jnp.round(p * 8) / 8 - p))
  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def weight_standardised(draw):
  def model(p, x):
    w = (p - p.mean((0, 1, 2))) / (p.std((0, 1, 2)) + 1e-2)
    return convolve(x, w, padding="SAME")

  return scored(model), draw(3, 3, 2, 3), draw(N, 4, 3, 2), draw.labels


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
def spectral_norm(draw):
  def model(p, x):
    v = lax.stop_gradient(_power_iterations(p))
    return x @ (p / jnp.linalg.norm(p @ v))

  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def spectral_norm_as_a_constant(draw):
  def model(p, x):
    v = _power_iterations(lax.stop_gradient(p))
    return x @ (p / lax.stop_gradient(jnp.linalg.norm(p @ v)))

  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def while_loop_on_stopped_params(draw):
  def model(p, x):
    frozen = lax.stop_gradient(p["w"])
    small = lambda state: jnp.sum(state**2) < 20.0
    state = lax.while_loop(small, lambda state: state + jnp.tanh(state @ frozen) + 0.5 * state, x)
    return lax.stop_gradient(state) @ p["w"] * p["scale"]

  return one_by_one(model), {"w": draw(3, 3), "scale": draw(3)}, draw(N, 3), draw.labels


@case
def while_loop_stopped_behind_it(draw):
  def model(p, x):
    small = lambda state: jnp.sum(state**2) < 20.0
    state = lax.while_loop(small, lambda state: state + jnp.tanh(state @ p["w"]) + 0.5 * state, x)
    return lax.stop_gradient(state) @ p["w"]

  return one_by_one(model), {"w": draw(3, 3)}, draw(N, 3), draw.labels


# --- functions inside the function


@case
def jit_inside(draw):
  @jax.jit
  def layer(w, x):
    return jnp.tanh(jax.jit(lambda w: 2 * w.T)(w) @ x)

  return (
    one_by_one(lambda p, x: layer(p["b"], layer(p["a"], x))),
    {"a": draw(4, 3), "b": draw(3, 4)},
    draw(N, 4),
    draw.labels,
  )


@case
def jit_inside_called_twice_on_one_param(draw):
  layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
  return scored(lambda p, x: layer(p, layer(p, x))), draw(3, 3), draw(N, 2, 3), draw.labels


@jax.custom_jvp
def _activation(x):
  return jnp.where(x > 0, x, 0.1 * x)


@_activation.defjvp
def _activation_jvp(primals, tangents):
  (x,), (t,) = primals, tangents
  return _activation(x), t * jax.nn.sigmoid(4 * x)  # not the true derivative


@case
def custom_jvp_on_data(draw):
  model = lambda p, x: _activation(x @ p["a"]) @ p["b"]
  return scored(model), {"a": draw(4, 3), "b": draw(3, 2)}, draw(N, 3, 4), draw.labels


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
def custom_vjp_with_static_arguments(draw):
  @partial(jax.custom_vjp, nondiff_argnums=(0, 2))
  def apply(function, w, power, x):
    return function(x @ w) ** power

  forward = lambda function, w, power, x: (apply(function, w, power, x), (w, x))

  def backward(function, power, kept, g):
    w, x = kept
    return power * x.T @ g, g @ w.T

  apply.defvjp(forward, backward)
  model = lambda p, x: apply(jnp.tanh, p["b"], 2, apply(jnp.sin, p["a"], 3, x))
  return one_by_one(model), {"a": draw(4, 3), "b": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def custom_gradient(draw):
  @jax.custom_gradient
  def dense(w, x):
    return x @ w, lambda g: (0.5 * x.T @ g, -g @ w.T)

  return (
    one_by_one(lambda p, x: dense(p["b"], jnp.tanh(dense(p["a"], x)))),
    {"a": draw(4, 3), "b": draw(3, 2)},
    draw(N, 3, 4),
    draw.labels,
  )


@case
def fixed_point_with_an_implicit_gradient(draw):
  def solve(step, start):
    return lax.while_loop(
      lambda s: jnp.max(abs(s[0] - s[1])) > 1e-14,
      lambda s: (step(s[0]), s[0]),
      (step(start), start),
    )[0]

  @jax.custom_vjp
  def fixed_point(w, x):
    return lax.fori_loop(0, 60, lambda _, z: jnp.tanh(w @ z + x), jnp.zeros_like(x))

  def forward(w, x):
    z = fixed_point(w, x)
    return z, (w, x, z)

  def backward(kept, g):
    w, x, z = kept
    _, pull_back = jax.vjp(lambda w, x, z: jnp.tanh(w @ z + x), w, x, z)
    u = lax.fori_loop(0, 60, lambda _, u: g + pull_back(u)[2], g)
    return pull_back(u)[:2]

  fixed_point.defvjp(forward, backward)
  model = lambda p, x: fixed_point(p["w"], x @ p["u"])
  return one_by_one(model), {"w": 0.3 * draw(3, 3), "u": draw(4, 3)}, draw(N, 4), draw.labels


@case
def checkpoint(draw):
  block = jax.checkpoint(lambda p, x: x + jnp.tanh(x @ p["a"] + p["b"]) @ p["c"])
  model = lambda p, x: block(p[1], block(p[0], x))
  return (
    scored(model),
    [{"a": draw(4, 3), "b": draw(3), "c": draw(3, 4)} for _ in range(2)],
    draw(N, 3, 4),
    draw.labels,
  )


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
def checkpoint_of_a_named_param(draw):
  @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("w"))
  def block(p, x):
    return jnp.tanh(x @ checkpoint_name(p["w"], "w")) @ p["v"]

  return scored(block), {"w": draw(4, 3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


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
def cond_on_data(draw):
  model = lambda p, x: lax.cond(x[0] > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x @ p["b"], x)
  return one_by_one(model), {"a": draw(4, 3), "b": draw(4, 3)}, draw(N, 4), draw.labels


@case
def cond_on_a_param(draw):
  def model(p, x):
    return lax.cond(jnp.sum(p["a"]) > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x @ p["b"], x)

  return scored(model), {"a": 1 + draw(4, 3), "b": draw(4, 3)}, draw(N, 3, 4), draw.labels


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
def switch_on_data(draw):
  branches = [
    lambda p, x: x @ p["a"],
    lambda p, x: jnp.sin(x @ p["b"]),
    lambda p, x: x @ (p["a"] + p["b"]),
  ]
  loss = lambda p, x, y: score(jax.vmap(lambda x, y: lax.switch(y, branches, p, x))(x, y), y)
  return loss, {"a": draw(4, 3), "b": draw(4, 3)}, draw(N, 4), draw.labels


@case
def gradient_of_the_model_in_the_loss(draw):
  def loss(p, x, y):
    energy = lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]))
    return score(jax.vmap(jax.grad(energy))(x), y)

  return loss, {"a": draw(4, 3), "b": draw(3), "c": draw(3, 2)}, draw(N, 4), draw.labels


@case
def gradient_of_a_convolution_in_the_loss(draw):
  def loss(p, x, y):
    energy = lambda x: jnp.sum(jnp.tanh(convolve(x[None], p, padding="SAME")))
    return score(jax.vmap(jax.grad(energy))(x), y)

  return loss, draw(3, 3, 2, 3), draw(N, 4, 3, 2), draw.labels


@case
def directional_derivative_in_the_loss(draw):
  def model(p, x):
    network = lambda x: jnp.tanh(x @ p["a"]) @ p["b"]
    return jnp.stack(jax.jvp(network, (x,), (jnp.cos(x),)))

  return one_by_one(model), {"a": draw(4, 3), "b": draw(3, 2)}, draw(N, 4), draw.labels


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


@case
def random_key_carried_by_a_scan(draw):
  def model(p, x):
    def step(carry, w):
      h, key = carry
      key, now = jax.random.split(key)
      kept = jax.random.bernoulli(now, np.float32(0.8), h.shape)  # the same bits with x64
      return (jnp.where(kept, jnp.tanh(h @ w), 0.0), key), None

    (h, _), _ = lax.scan(step, (x, jax.random.key(3)), p)
    return h

  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def random_key_carried_by_a_scan_over_data(draw):
  def model(p, x):
    def step(key, row):
      key, now = jax.random.split(key)
      return key, row + 0.3 * jax.random.normal(now, row.shape, np.float32)

    _, noisy = lax.scan(step, jax.random.key(3), x)
    return jnp.tanh(noisy @ p)

  return one_by_one(model), draw(4, 3), draw(N, 3, 4), draw.labels


# --- loops


def _layers(draw, layers=3, width=4):
  return {
    "w": draw(layers, width, width),
    "b": draw(layers, width),
    "v": draw(layers, width, width),
  }


def _block(p, x):
  return x + jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


@case
def scan_over_layers(draw):
  model = lambda p, x: lax.scan(lambda x, p: (_block(p, x), None), x, p)[0]
  return scored(model), _layers(draw), draw(N, 3, 4), draw.labels


@case(concrete=True)
def scan_over_layers_rematerialised(draw):
  model = lambda p, x: lax.scan(jax.checkpoint(lambda x, p: (_block(p, x), None)), x, p)[0]
  return scored(model), _layers(draw), draw(N, 3, 4), draw.labels


@case
def scan_reversed_unrolled(draw):
  model = lambda p, x: lax.scan(lambda x, p: (_block(p, x), None), x, p, reverse=True, unroll=2)[0]
  return scored(model), _layers(draw), draw(N, 4), draw.labels


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
def scan_over_a_layer_used_twice(draw):
  model = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w.T), None), x, p)[0]
  return scored(model), draw(3, 4, 2), draw(N, 2, 4), draw.labels


@case
def scan_over_rearranged_params(draw):
  model = lambda p, x: lax.scan(
    lambda x, w: (jnp.tanh(x @ w.T), None), x, 0.5 * p.transpose(2, 0, 1)[::-1]
  )[0]
  return scored(model), draw(4, 4, 3), draw(N, 2, 4), draw.labels


@case
def scan_over_the_same_params_twice(draw):
  model = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (p, p))[0]
  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def scan_twice_over_the_same_params(draw):
  run = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]
  return scored(lambda p, x: run(p, run(p, x))), draw(2, 4, 4), draw(N, 4), draw.labels


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
def scan_that_starts_at_a_param(draw):
  def model(p, x):
    return lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row), None), p["start"], x)[0]

  return one_by_one(model), {"start": draw(3), "w": draw(3, 3)}, draw(N, 4, 3), draw.labels


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
def scan_whose_branch_is_scanned(draw):
  def model(p, x):
    def step(x, layer):
      w, odd = layer
      return lax.cond(odd, lambda x: jnp.tanh(x @ w), lambda x: jnp.sin(x @ w.T) + x, x), None

    return lax.scan(step, x, (p, np.array([True, False, True])))[0]

  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def scan_nested(draw):
  def model(p, x):
    inner = lambda x, w: (jnp.tanh(x @ w), None)
    outer = lambda x, p: (lax.scan(inner, x @ p["v"], p["w"])[0], None)
    return lax.scan(outer, x, p)[0]

  return scored(model), {"v": draw(2, 4, 4), "w": draw(2, 3, 4, 4)}, draw(N, 2, 4), draw.labels


@case
def scan_over_convolutions(draw):
  step = lambda x, w: (x + jnp.tanh(convolve(x, w, padding="SAME")), None)
  return (
    scored(lambda p, x: lax.scan(step, x, p)[0]),
    draw(2, 3, 3, 2, 2),
    draw(N, 4, 3, 2),
    draw.labels,
  )


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
def map_over_tokens(draw):
  model = lambda p, x: lax.map(lambda row: jnp.tanh(row @ p["a"]) @ p["b"], x)
  return one_by_one(model), {"a": draw(4, 3), "b": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def recurrent(draw):
  def model(p, x):
    step = lambda h, row: (jnp.tanh(row @ p["in"] + h @ p["hidden"] + p["b"]), None)
    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 3)).astype(x.dtype), x.swapaxes(0, 1))
    return h @ p["out"]

  params = {"in": draw(4, 3), "hidden": draw(3, 3), "b": draw(3), "out": draw(3, 3)}
  return classified(model), params, draw(N, 4, 4), draw.labels


@case
def long_short_term_memory(draw):
  def model(p, x):
    def step(state, row):
      h, c = state
      i, f, o, g = jnp.split(jnp.concatenate([row, h]) @ p["w"] + p["b"], 4)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return (h, c), h

    zeros = jnp.zeros(3, x.dtype)
    return lax.scan(step, (zeros, zeros), x, reverse=True)[1]

  return one_by_one(model), {"w": draw(7, 12), "b": draw(12)}, draw(N, 3, 4), draw.labels


@case
def fori_loop_that_indexes_a_stack(draw):
  model = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p[i]), x)
  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def fori_loop_with_a_shared_param(draw):
  model = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p) + 0.1 * i, x)
  return scored(model), draw(4, 4), draw(N, 2, 4), draw.labels


@case
def python_loop_that_indexes_a_stack(draw):
  def model(p, x):
    for index in (0, 1, 2, 1):
      x = jnp.tanh(x @ p[index])
    return x

  return scored(model), draw(3, 4, 4), draw(N, 2, 4), draw.labels


@case
def associative_scan(draw):
  def model(p, x):
    decay = jax.nn.sigmoid(x @ p["decay"])
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    return lax.associative_scan(combine, (decay, x @ p["in"]), axis=1)[1] @ p["out"]

  return (
    scored(model),
    {"decay": draw(4, 3), "in": draw(4, 3), "out": draw(3, 2)},
    draw(N, 5, 4),
    draw.labels,
  )


@case
def hidden_markov_chain(draw):
  def loss(p, x, y):
    emit = jax.nn.log_softmax(p["emit"])
    move = jax.nn.log_softmax(p["move"])
    step = lambda alpha, seen: (
      jax.nn.logsumexp(alpha[:, None] + move, axis=0) + emit[:, seen],
      None,
    )
    alone = lambda seen: -jax.nn.logsumexp(lax.scan(step, jax.nn.log_softmax(p["start"]), seen)[0])
    return jax.vmap(alone)(x)

  return (
    loss,
    {"emit": draw(3, 4), "move": draw(3, 3), "start": draw(3)},
    draw.ints(4, N, 4),
    draw.labels,
  )


@case
def runge_kutta(draw):
  def model(p, x):
    slope = lambda x: jnp.tanh(x @ p["a"]) @ p["b"]

    def step(x, dt):
      k1 = slope(x)
      k2 = slope(x + dt * k1 / 2)
      return x + dt * (k1 + k2) / 2, None

    return lax.scan(step, x, np.full(3, 0.3, np.float32))[0]

  return scored(model), {"a": draw(4, 3), "b": draw(3, 4)}, draw(N, 4), draw.labels


# --- losses


def _logits(p, x):
  return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def _mlp_params(draw, inputs=4, classes=3):
  return {"a": draw(inputs, 5), "b": draw(5), "c": draw(5, classes)}


@case
def soft_labels(draw):
  loss = lambda p, x, y: -jnp.sum(y * jax.nn.log_softmax(_logits(p, x)), -1)
  soft = np.asarray(draw.rng.dirichlet(np.ones(3), N), np.float32)
  return loss, _mlp_params(draw), draw(N, 4), soft


@case
def label_smoothing(draw):
  def loss(p, x, y):
    return -jnp.sum((0.9 * jax.nn.one_hot(y, 3) + 0.1 / 3) * jax.nn.log_softmax(_logits(p, x)), -1)

  return loss, _mlp_params(draw), draw(N, 4), draw.labels


@case
def focal_loss(draw):
  def loss(p, x, y):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(_logits(p, x)), y[:, None], 1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p

  return loss, _mlp_params(draw), draw(N, 4), draw.labels


@case
def squared_loss(draw):
  loss = lambda p, x, y: 0.5 * jnp.sum((_logits(p, x) - y) ** 2, -1)
  return loss, _mlp_params(draw), draw(N, 4), draw(N, 3)


@case
def softmax_cross_entropy_of_a_sure_model(draw):
  loss = lambda p, x, y: mj.softmax_cross_entropy(10 * _logits(p, x), y)
  return loss, _mlp_params(draw), draw(N, 4), draw.labels


@case
def token_losses_summed_with_a_mask(draw):
  def loss(p, x, y):
    log_p = jax.nn.log_softmax(_logits(p, p["table"][x]))
    each = -jnp.take_along_axis(log_p, y["next"][..., None], -1)[..., 0]
    return jnp.sum(each * y["mask"], -1) / jnp.sum(y["mask"], -1)

  mask = np.asarray(draw.ints(2, N, 4), np.float32)
  mask[:, 0] = 1
  labels = {"next": draw.ints(3, N, 4), "mask": mask}
  return loss, {"table": draw(6, 4), **_mlp_params(draw)}, draw.ints(6, N, 4), labels


@case(concrete=True)
def inputs_in_a_tree(draw):
  def loss(p, x, y):
    image, (token, number) = x["image"], x["rest"]
    h = convolve(image, p["kernel"]).mean((1, 2)) + p["table"][token] + number[:, None] * p["scale"]
    return mj.softmax_cross_entropy(jnp.tanh(h) @ p["w"], y["class"]) + (h[:, 0] - y["number"]) ** 2

  params = {"kernel": draw(2, 2, 1, 4), "table": draw(5, 4), "scale": draw(4), "w": draw(4, 3)}
  inputs = {"image": draw(N, 3, 3, 1), "rest": (draw.ints(5, N), draw(N))}
  return loss, params, inputs, {"class": draw.labels, "number": draw(N)}


@case
def two_towers(draw):
  def loss(p, x, y):
    encode = lambda x: jnp.tanh(x @ p["a"]) @ p["b"]
    a, b = encode(x["a"]), encode(x["b"])
    similar = jnp.sum(a * b, -1) / jnp.sqrt(jnp.sum(a**2, -1) * jnp.sum(b**2, -1) + 1e-3)
    return jax.nn.softplus(jnp.where(y == 0, similar, -similar) * jnp.exp(p["temperature"]))

  params = {"a": draw(4, 5), "b": draw(5, 3), "temperature": draw()}
  return loss, params, {"a": draw(N, 4), "b": draw(N, 4)}, draw.labels


# --- whole models


@case
def mlp(draw):
  params = [{"w": draw(a, b), "b": draw(b)} for a, b in ((4, 6), (6, 5), (5, 3))]

  def model(p, x):
    for layer in p[:-1]:
      x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ p[-1]["w"] + p[-1]["b"]

  return classified(model), params, draw(N, 4), draw.labels


@case
def cnn(draw):
  def model(p, x):
    x = jax.nn.relu(convolve(x, p["a"], padding="SAME") + p["bias"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(convolve(x, p["b"]))
    return x.reshape(x.shape[0], -1) @ p["c"]

  params = {"a": draw(3, 3, 1, 4), "bias": draw(4), "b": draw(2, 2, 4, 4), "c": draw(16, 3)}
  return classified(model), params, draw(N, 6, 6, 1), draw.labels


def _eval_batch_norm(draw, width):
  mean, variance = draw(width), 0.5 + abs(draw(width))
  return lambda p, x: (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


@case(concrete=True)
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


@case
def resnext_block(draw):
  norm = _eval_batch_norm(draw, 4)

  def model(p, x):
    y = jax.nn.relu(convolve(x, p["reduce"]))
    y = jax.nn.relu(
      norm(p["norm"], convolve(y, p["grouped"], padding="SAME", feature_group_count=2))
    )
    return (x + convolve(y, p["expand"])).mean((1, 2)) @ p["head"]

  params = {
    "reduce": draw(1, 1, 6, 4),
    "grouped": draw(3, 3, 2, 4),
    "expand": draw(1, 1, 4, 6),
    "head": draw(6, 3),
  }
  params["norm"] = {"scale": 1 + draw(4), "bias": draw(4)}
  return classified(model), params, draw(N, 4, 3, 6), draw.labels


@case
def depthwise_separable_block_with_squeeze_and_excite(draw):
  def model(p, x):
    y = jax.nn.silu(convolve(x, p["expand"]) * p["scale"])
    y = jax.nn.silu(convolve(y, p["depthwise"], padding="SAME", feature_group_count=6))
    squeezed = jax.nn.relu(y.mean((1, 2), keepdims=True) @ p["squeeze"])
    y = convolve(y * jax.nn.sigmoid(squeezed @ p["excite"]), p["project"]) + x
    return y.mean((1, 2)) @ p["head"]

  params = {
    "expand": draw(1, 1, 3, 6),
    "scale": draw(6),
    "depthwise": draw(3, 3, 1, 6),
    "squeeze": draw(6, 2),
  }
  params |= {"excite": draw(2, 6), "project": draw(1, 1, 6, 3), "head": draw(3, 3)}
  return classified(model), params, draw(N, 4, 4, 3), draw.labels


@case
def wavenet(draw):
  def model(p, x):
    skip = 0.0
    for dilation, layer in zip((1, 2, 4), p["layers"], strict=True):
      y = convolve(x, layer["w"], _NWC, padding=((dilation, 0),), rhs_dilation=(dilation,))
      y = jnp.tanh(y[..., :3]) * jax.nn.sigmoid(y[..., 3:])
      skip = skip + y @ layer["skip"]
      x = x + y @ layer["residual"]
    return skip

  layers = [{"w": draw(2, 3, 6), "skip": draw(3, 2), "residual": draw(3, 3)} for _ in range(3)]
  return scored(model), {"layers": layers}, draw(N, 6, 3), draw.labels


@case
def u_net(draw):
  def model(p, x):
    a = jax.nn.relu(convolve(x, p["in"], padding="SAME"))
    b = jax.nn.relu(convolve(a, p["down"], window_strides=(2, 2), padding="SAME"))
    up = lax.conv_transpose(b, p["up"], (2, 2), "SAME", dimension_numbers=_NHWC)
    return convolve(jnp.concatenate([a, up], -1), p["out"], padding="SAME")

  params = {
    "in": draw(3, 3, 1, 3),
    "down": draw(3, 3, 3, 4),
    "up": draw(2, 2, 4, 3),
    "out": draw(3, 3, 6, 1),
  }
  return scored(model), params, draw(N, 4, 4, 1), draw.labels


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
def swin_block_with_shifted_windows(draw):
  side, window = 4, 2
  places = np.stack(np.meshgrid(range(window), range(window), indexing="ij"), -1).reshape(-1, 2)
  offsets = places[:, None] - places[None] + window - 1
  index = offsets[..., 0] * (2 * window - 1) + offsets[..., 1]
  regions = np.roll(np.arange(side) // window * 2, 1)
  region = (regions[:, None] * 10 + regions).reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
  mask = np.where(region[:, None, :, None] == region[:, None, None, :], 0, -100).astype(np.float32)

  def model(p, x):
    n, _, _, c = x.shape
    x = jnp.roll(x, (-1, -1), (1, 2))
    windows = x.reshape(n, 2, window, 2, window, c).swapaxes(2, 3).reshape(n, 4, 4, c)
    bias = p["relative"][index.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
    windows = _transformer_block(p["block"], windows, bias + mask)
    x = windows.reshape(n, 2, 2, window, window, c).swapaxes(2, 3).reshape(n, side, side, c)
    merged = (
      jnp.roll(x, (1, 1), (1, 2)).reshape(n, 2, 2, 2, 2, c).swapaxes(2, 3).reshape(n, 4, 4 * c)
    )
    return (layer_norm(merged) @ p["merge"]).mean(1) @ p["head"]

  params = {
    "relative": draw(9, 2),
    "merge": draw(16, 5),
    "head": draw(5, 3),
    "block": _attention_params(draw),
  }
  return classified(model), params, draw(N, side, side, 4), draw.labels


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
def rotary_grouped_query_attention(draw):
  angles = np.outer(np.arange(3), [1.0, 0.1]).astype(np.float32)

  def rotate(x):
    a, b = jnp.split(x, 2, -1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

  def model(p, x):
    q = rotate((x @ p["q"]).reshape(*x.shape[:2], 4, 4))
    k, v = jnp.split((x @ p["kv"]).reshape(*x.shape[:2], 4, 4), 2, axis=2)
    weights = jax.nn.softmax(
      jnp.einsum("ntkge,nske->nkgts", q.reshape(*q.shape[:2], 2, 2, 4), rotate(k))
    )
    y = jnp.einsum("nkgts,nske->ntkge", weights, v).reshape(*x.shape[:2], 16) @ p["o"]
    norm = lambda x: x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * p["norm"]
    return norm(x + y)

  return (
    scored(model),
    {"q": draw(4, 16), "kv": draw(4, 16), "o": draw(16, 4), "norm": draw(4)},
    draw(N, 3, 4),
    draw.labels,
  )


@case
def mixture_of_experts(draw):
  def model(p, x):
    gates = jax.nn.softmax(x @ p["gate"])
    best, which = lax.top_k(gates, 2)
    kept = jnp.sum(jax.nn.one_hot(which, 3) * best[..., None], -2)
    hidden = jax.nn.relu(jnp.einsum("ntd,edf->netf", x, p["up"]))
    return jnp.einsum("netf,efd,nte->ntd", hidden, p["down"], kept)

  return (
    scored(model),
    {"gate": draw(4, 3), "up": draw(3, 4, 5), "down": draw(3, 5, 4)},
    draw(N, 4, 4),
    draw.labels,
  )


@case
def graph_network(draw):
  def model(p, x):
    h = jnp.tanh(x["nodes"] @ p["a"])
    messages = jax.nn.relu(jnp.concatenate([h[x["from"]], h[x["to"]]], -1) @ p["edge"])
    return jax.ops.segment_sum(messages, x["to"], 4) @ p["out"]

  params = {"a": draw(3, 4), "edge": draw(8, 4), "out": draw(4, 2)}
  inputs = {"nodes": draw(N, 4, 3), "from": draw.ints(4, N, 5), "to": draw.ints(4, N, 5)}
  return one_by_one(model), params, inputs, draw.labels


@case
def mixer_with_group_norm(draw):
  def model(p, x):
    x = x + jax.nn.gelu(x.swapaxes(1, 2) @ p["tokens"]).swapaxes(1, 2)
    grouped = x.reshape(*x.shape[:2], 2, 2)
    grouped = (grouped - grouped.mean((1, 3), keepdims=True)) / jnp.sqrt(
      grouped.var((1, 3), keepdims=True) + 1e-3
    )
    return jnp.tanh(grouped.reshape(x.shape) * p["scale"] @ p["channels"]).mean(1) @ p["head"]

  params = {"tokens": draw(3, 3), "scale": draw(4), "channels": draw(4, 4), "head": draw(4, 3)}
  return classified(model), params, draw(N, 3, 4), draw.labels


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


@case
def barriers_and_platforms(draw):
  def model(p, x):
    w, v = lax.optimization_barrier((p["w"], p["v"]))
    y = lax.platform_dependent(x, w, cpu=lambda x, w: x @ w, default=lambda x, w: x @ w)
    return jnp.tanh(y) @ v

  return scored(model), {"w": draw(4, 3), "v": draw(3, 2)}, draw(N, 3, 4), draw.labels


@case
def named_scopes(draw):
  def model(p, x):
    with jax.named_scope("layer"):
      return jax.named_call(lambda w: x @ w, name="dense")(p)

  return scored(model), draw(4, 3), draw(N, 3, 4), draw.labels


@case
def sparse_neighbours(draw):
  graph = sparse.BCOO.fromdense(draw.ints(2, 4, 4).astype(np.float32))
  model = lambda p, x: jnp.tanh(graph @ (x @ p["a"])) @ p["b"]
  return one_by_one(model), {"a": draw(3, 4), "b": draw(4, 2)}, draw(N, 4, 3), draw.labels


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


@case
def hessian_and_determinant(draw):
  def model(p, x):
    energy = lambda x: jnp.sum(jnp.tanh(x @ p) ** 2)
    return jnp.linalg.slogdet(jax.hessian(energy)(x) + 3 * np.eye(3, dtype=np.float32))[1]

  return one_by_one(model), draw(3, 4), draw(N, 3), draw.labels


@case
def attention_of_jax(draw):
  def model(p, x):
    q, k, v = (jnp.einsum("ntd,dhe->nthe", x, p[name]) for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  return scored(model), {name: draw(4, 2, 3) for name in "qkv"}, draw(N, 3, 4), draw.labels


# --- random graphs: functions of the state (tokens, width), a source of new params, and those made so far

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
