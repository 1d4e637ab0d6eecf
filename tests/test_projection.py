"""Projection and DropRow: the cut, the sites, the head, against NumPy twins."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from toys import assert_trees_close, host

import mnemonic_jax as mj
from mnemonic_jax.methods import directions

pytestmark = pytest.mark.filterwarnings("ignore:The model classifies")

CLASSES, PER_CLASS, POSITIONS, INPUTS, WIDTH = 5, 3, 4, 6, 8
FORGET = np.array([True, False, False, True, False])
KEPT = np.array([False, True, True, False, False])  # class 4 was forgotten before


# The cut of an array -----------------------------------------------------------------------------


def means(seed=0, classes=CLASSES, width=WIDTH):
  return np.random.default_rng(seed).normal(size=(classes, width)).astype(np.float32)


def cut(means, forget=FORGET, kept=KEPT, groups=1):
  """The cut by one code a class."""
  weights = both(np.eye(len(means), dtype=np.float32))
  return directions.cut(jnp.asarray(means), weights, jnp.asarray(forget), jnp.asarray(kept), groups)


def both(weights):
  """Codes that show means and spread."""
  return directions.Weights(jnp.asarray(weights), jnp.asarray(weights))


def as_matrix(cut):
  """D W (F, F) of a cut of one group."""
  return np.asarray(cut.directions[0], np.float64) @ np.asarray(cut.weights[0], np.float64)


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("width", [WIDTH, 40])  # fewer channels than codes, and more
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_cut_is_that_of_the_twin(scale, width, per_class):
  vectors = means(classes=CLASSES * per_class, width=width).reshape(CLASSES, per_class, width)
  weights = np.repeat(np.eye(CLASSES, dtype=np.float32), per_class, axis=1) / per_class
  flat = jnp.asarray(vectors.reshape(-1, width) * scale)
  found = directions.cut(flat, both(weights), jnp.asarray(FORGET), jnp.asarray(KEPT))
  gone, weights = reference.cut(vectors, FORGET, KEPT)
  np.testing.assert_allclose(found.directions[0] / scale, gone, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.weights[0] * scale, weights, rtol=1e-3, atol=1e-5)
  assert found.rank.tolist() == [2]


def test_the_spread_of_kept_codes_is_spared():
  """What reaches the kept codes' own channel is smaller than by their means alone."""
  vectors = means(classes=CLASSES * 3).reshape(CLASSES, 3, WIDTH)
  weights = np.repeat(np.eye(CLASSES, dtype=np.float32), 3, axis=1) / 3
  spread = directions.cut(jnp.asarray(vectors.reshape(-1, WIDTH)), both(weights), FORGET, KEPT)
  alone = cut(vectors.mean(1))
  kept = vectors[KEPT].reshape(-1, WIDTH)
  harm = lambda one: np.linalg.norm(kept @ np.asarray(one.weights[0]).T)
  assert harm(spread) < 0.9 * harm(alone)


def test_the_cut_moves_forgotten_means_to_the_kept_one():
  found = cut(means())
  left = means() - np.asarray(found.taken(jnp.asarray(means() - means()[KEPT].mean(0))))
  np.testing.assert_allclose(left[FORGET], np.tile(means()[KEPT].mean(0), (2, 1)), atol=1e-5)


@pytest.mark.parametrize(
  "same",
  [[(3, 0, 1.0)], [(3, 0, -2.0)], [(3, 0, 1.0), (2, 0, 1.0)]],
  ids=["equal", "dependent", "three"],
)
def test_dependent_directions_are_cut_exactly(same):
  """Equal columns of D, opposite ones: D W D = D all the same."""
  forget, kept = np.array([1, 0, 1, 1, 0], bool), np.array([0, 1, 0, 0, 1], bool)
  some = means()
  mu = some[kept].mean(0)
  for to, of, factor in same:
    some[to] = mu + factor * (some[of] - mu)
  found = cut(some, forget, kept)
  gone = np.asarray(found.directions[0], np.float64)
  np.testing.assert_allclose(as_matrix(found) @ gone, gone, atol=1e-4 * np.abs(gone).max())
  assert int(found.rank[0]) == 3 - len(same)


def test_weights_are_the_smallest_that_keep_the_kept_means():
  """W minimises ||W M_kept||^2 + (0.1 s)^2 ||W||^2 under W D = 1 on the forgotten classes."""
  found = cut(means())
  gone, weights = (np.asarray(x[0], np.float64) for x in found[:2])
  mu = means()[KEPT].mean(0)
  both = np.concatenate([means()[FORGET] - mu, means()[KEPT]])
  tie = 0.01 * np.linalg.norm(both, 2) ** 2
  cost = lambda w: np.sum((w @ means()[KEPT].T) ** 2) + tie * np.sum(w**2)
  rows = weights[FORGET]
  np.testing.assert_allclose(rows @ gone[:, FORGET], np.eye(2), atol=1e-4)
  free = np.eye(WIDTH) - gone[:, FORGET] @ np.linalg.pinv(gone[:, FORGET])
  rng = np.random.default_rng(3)
  for _ in range(20):
    other = rows + 0.01 * rng.normal(size=rows.shape) @ free
    assert cost(other) > cost(rows)


@pytest.mark.parametrize("case", ["nobody", "no kept class", "no direction"])
def test_without_a_direction_nothing_is_cut(case):
  forget = np.zeros(CLASSES, bool) if case == "nobody" else FORGET
  kept = np.zeros(CLASSES, bool) if case == "no kept class" else KEPT
  some = np.ones_like(means()) if case == "no direction" else means()
  found = cut(some, forget, kept)
  if case == "no kept class":
    assert np.isfinite(as_matrix(found)).all()
  else:
    assert not as_matrix(found).any()


def test_as_many_directions_as_channels_leave_the_array_alone():
  found = cut(means(width=2))
  assert int(found.rank[0]) == 2 and not as_matrix(found).any()


def test_groups_are_cut_by_themselves():
  """Two groups of 8 channels, and a third that tells nothing."""
  parts = [means(seed) for seed in (0, 1)] + [np.ones((CLASSES, WIDTH), np.float32)]
  found = cut(np.concatenate(parts, axis=1), groups=3)
  for group, part in enumerate(parts):
    alone = cut(part)
    np.testing.assert_allclose(found.directions[group], alone.directions[0], atol=1e-6)
    np.testing.assert_allclose(found.weights[group], alone.weights[0], atol=1e-5)
  assert found.rank.tolist() == [2, 2, 0]


# A residual network ------------------------------------------------------------------------------

SHAPES = {
  "k1": (INPUTS, WIDTH),
  "k2": (WIDTH, WIDTH),
  "k3": (WIDTH, WIDTH),
  "k4": (WIDTH, WIDTH),
  "k5": (WIDTH, WIDTH),
  "k6": (WIDTH, WIDTH),
  "k7": (WIDTH, CLASSES),
  "b1": (WIDTH,),
  "b4": (WIDTH,),
  "b5": (WIDTH,),
  "b7": (CLASSES,),
  "beta": (WIDTH,),
  "s": (WIDTH,),
  "m": (WIDTH,),
}
DEPTHS = {0: (), 1: ("z3",), 2: ("z2", "z3"), 3: ("z1", "z2", "z3")}


def draw(seed=0):
  rng = np.random.default_rng(seed)
  drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  return {name: x / np.float32(3 if x.ndim > 1 else 2) for name, x in drawn.items()}


def codes_of(seed=0):
  shape = CLASSES, PER_CLASS, POSITIONS, INPUTS
  return np.random.default_rng(seed + 100).normal(size=shape).astype(np.float32)


def dense(params, inputs):
  """`reference.residual_net` in JAX; scale and statistics are params too, which stay."""
  p = params
  h1 = jnp.tanh(inputs @ p["k1"] + p["b1"])
  u = h1 @ p["k2"]
  normalised = (jnp.tanh(u) @ p["k3"] - p["m"]) * p["s"] + p["beta"]
  h2 = jnp.tanh(h1 + normalised)
  v = h2 @ p["k4"] + p["b4"]
  h3 = jnp.tanh(jnp.tanh(v) @ p["k5"] + p["b5"] + h2 @ p["k6"])
  return h3.mean(-2) @ p["k7"] + p["b7"]


def convolved(params, inputs):
  """The same, its products as convolutions of one tap, its arrays channels first at times."""
  p = params
  conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
  )
  h1 = jnp.tanh(conv(inputs, p["k1"]) + p["b1"])
  u = conv(h1, p["k2"])
  z2 = (conv(jnp.tanh(u), p["k3"]) - p["m"]) * p["s"] + p["beta"] + h1
  h2 = jnp.tanh(jnp.swapaxes(z2, 1, 2))
  v = jnp.einsum("nct,cd->ntd", h2, p["k4"]) + p["b4"]
  h2 = jnp.swapaxes(h2, 1, 2)
  h3 = jnp.tanh(conv(jnp.tanh(v), p["k5"]) + (conv(h2, p["k6"]) + p["b5"]))
  return jnp.mean(h3 @ p["k7"] + p["b7"], axis=-2)


def edited(twin, remain=KEPT):
  kernel, bias = reference.row_dropped(twin["k7"], twin["b7"], remain)
  return {**twin, "k7": kernel, "b7": bias}


STEP = functools.partial(jax.jit, static_argnums=(0, 3))(
  lambda model, params, codes, method: mj.forget_step(
    model, params, codes, jnp.asarray(FORGET), jnp.asarray(KEPT), method
  )
)


@pytest.mark.parametrize("model", [dense, convolved], ids=["dense", "convolved"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_projection_is_that_of_the_twin(model, depth):
  params, codes = draw(), codes_of()
  moved, info = STEP(model, params, codes, mj.Projection(depth=depth))
  twin = reference.projected_residual_net(params, codes, FORGET, KEPT, DEPTHS[depth])
  assert_trees_close(moved, edited(twin), rtol=2e-4, atol=2e-4)
  assert float(info.code_forget_error) == 1
  changed = {name for name in params if not np.array_equal(moved[name], params[name])}
  assert ("k1" in changed) == (depth >= 3) and ("k3" in changed) == (depth >= 2)
  assert not changed & {"k2", "k4", "b4", "s", "m"}, "bypassed sites, scales and statistics stay"


def test_judges_show_how_the_kept_classes_spread():
  """Class 1 has two judges of three, class 2 none, so that its codes serve."""
  params, codes, rng = draw(), codes_of(), np.random.default_rng(5)
  judges = rng.normal(size=(CLASSES, 3, POSITIONS, INPUTS)).astype(np.float32)
  shares = np.full((CLASSES, 3), 1 / 3, np.float32)
  shares[1], shares[2] = (0.7, 0.3, 0), 0
  learned = mj.LearnedCodes(codes, judges, shares, 0.9 * shares, 1 + shares, codes[:, :0])
  method = mj.Projection(depth=2)
  moved, _ = mj.forget_step(dense, params, learned, FORGET, KEPT, method)
  arguments = params, codes, FORGET, KEPT, DEPTHS[2]
  twin = reference.projected_residual_net(*arguments, judges, shares)
  assert_trees_close(host(moved), edited(twin), rtol=2e-4, atol=2e-4)
  without = edited(reference.projected_residual_net(*arguments))
  assert np.abs(without["k3"] - twin["k3"]).max() > 1e-2


def test_sites_are_cut_by_name():
  params, codes = draw(), codes_of()
  moved, _ = STEP(dense, params, codes, mj.Projection(sites=("k2", "k5")))
  twin = reference.projected_residual_net(params, codes, FORGET, KEPT, ("u", "z3"))
  assert_trees_close(moved, edited(twin), rtol=2e-4, atol=2e-4)


def test_the_plain_function_finds_the_arrays_of_the_pass():
  """A forgotten mean is the kept one at sites without an identity shortcut."""
  params, codes = draw(), codes_of()
  moved, _ = STEP(dense, params, codes, mj.Projection(depth=3))
  arrays, _ = reference.residual_net(host(moved), codes)
  for site in ("z1", "z3"):
    mean = arrays[site].mean((1, 2))
    np.testing.assert_allclose(mean[FORGET], np.tile(mean[KEPT].mean(0), (2, 1)), atol=1e-4)


def test_explain_names_sites_and_head():
  plan = mj.explain_projection(dense, draw(), codes_of()[:, 0])
  assert [(s.name, s.depth) for s in plan.sites] == [
    ("k1", 3),
    ("k2", None),
    ("k3", 2),
    ("k4", None),
    ("k5", 1),
  ]
  assert plan.sites[-1].kernels == ("k5", "k6")
  assert (plan.head, plan.head_reason, plan.not_edited) == ("k7", "", {})


# Other shapes of models --------------------------------------------------------------------------


def stacked_params(layers=3):
  rng = np.random.default_rng(7)
  draw = lambda *shape: (rng.normal(size=shape) / 3).astype(np.float32)
  return {
    "first": draw(INPUTS, WIDTH),
    "up": draw(layers, WIDTH, 12),
    "down": draw(layers, 12, WIDTH),
    "bias": draw(layers, WIDTH),
    "head": {"kernel": draw(WIDTH, CLASSES), "bias": draw(CLASSES)},
  }


def block(x, layer):
  up, down, bias = layer
  y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
  return x + jax.nn.gelu(y @ up) @ down + bias


def scanned(params, inputs, wrap=lambda f: f):
  layers = params["up"], params["down"], params["bias"]
  step = lambda x, layer: (wrap(block)(x, layer), None)
  x, _ = jax.lax.scan(step, inputs @ params["first"], layers)
  return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]


def unrolled(params, inputs, wrap=lambda f: f):
  x = inputs @ params["first"]
  for layer in range(3):
    x = wrap(block)(x, (params["up"][layer], params["down"][layer], params["bias"][layer]))
  return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
  "model",
  [
    unrolled,
    functools.partial(scanned, wrap=jax.checkpoint),
    functools.partial(unrolled, wrap=jax.checkpoint),
    functools.partial(unrolled, wrap=jax.jit),
  ],
  ids=["unrolled", "scan of remat", "remat", "jit"],
)
def test_layers_forget_alike_however_they_are_run(model):
  params, codes = stacked_params(), codes_of(2)
  wanted, info = STEP(scanned, params, codes, mj.Projection(depth=3))
  moved, other = STEP(model, params, codes, mj.Projection(depth=3))
  assert_trees_close(moved, wanted, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(other.info["rank"], info.info["rank"])
  assert not np.allclose(moved["down"], params["down"], atol=1e-3)
  np.testing.assert_array_equal(np.asarray(moved["up"]), params["up"])


def test_scanned_sites_have_names_of_their_own():
  plan = mj.explain_projection(scanned, stacked_params(), codes_of(2)[:, 0])
  names = [(site.name, site.depth) for site in plan.sites]
  assert names[0] == ("first", 4)
  assert names[1:] == [
    pair for i in range(3) for pair in ((f"up[{i}]", None), (f"down[{i}]", 3 - i))
  ]


def grouped(params, inputs):
  conv = lambda x, k, groups: jax.lax.conv_general_dilated(
    x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
  )
  h = jnp.tanh(conv(inputs, params["first"], 1))
  h = jnp.tanh(conv(h, params["two"], 2) + params["bias"])
  h = jnp.tanh(conv(h, params["each"], WIDTH))
  return h.mean(1) @ params["head"]


def test_groups_of_convolutions_are_cut_by_themselves_and_narrow_ones_told():
  rng = np.random.default_rng(5)
  draw = lambda *shape: (rng.normal(size=shape) / 2).astype(np.float32)
  params = {
    "first": draw(3, INPUTS, WIDTH),
    "two": draw(3, WIDTH // 2, WIDTH),
    "bias": draw(WIDTH),
    "each": draw(3, 1, WIDTH),
    "head": draw(WIDTH, CLASSES),
  }
  codes = codes_of(4)
  moved, info = STEP(grouped, params, codes, mj.Projection(depth=3))
  np.testing.assert_array_equal(info.info["cut"], [1, 1, 0])
  np.testing.assert_array_equal(moved["each"], params["each"])
  p = jax.tree.map(np.asarray, moved)
  conv = lambda x, k, g: jax.lax.conv_general_dilated(
    x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=g
  )
  flat = codes.reshape(-1, POSITIONS, INPUTS)
  two = conv(jnp.tanh(conv(flat, p["first"], 1)), p["two"], 2) + p["bias"]
  mean = np.asarray(two).reshape(CLASSES, -1, WIDTH).mean(1)
  np.testing.assert_allclose(mean[FORGET], np.tile(mean[KEPT].mean(0), (2, 1)), atol=1e-4)


def test_a_mask_keeps_leaves_and_a_dead_channel_stays():
  params, codes = draw(), codes_of()
  params["s"][2] = 0
  mask = {name: name not in ("k6", "b5") for name in params}
  moved, _ = mj.forget_step(
    dense, params, codes, jnp.asarray(FORGET), jnp.asarray(KEPT), mj.Projection(depth=2), mask=mask
  )
  for name in ("k6", "b5", "k1", "s", "m"):
    np.testing.assert_array_equal(moved[name], params[name])
  np.testing.assert_array_equal(np.asarray(moved["k3"])[:, 2], params["k3"][:, 2])
  assert not np.array_equal(moved["k5"], params["k5"])
  assert not np.array_equal(moved["k3"], params["k3"])


def test_a_kernel_that_is_read_twice_is_told_and_left():
  tied = lambda p, x: jnp.tanh(jnp.tanh(x @ p["k"]) @ p["k"]).mean(1) @ p["head"]
  rng = np.random.default_rng(0)
  params = {
    "k": rng.normal(size=(INPUTS, INPUTS)).astype(np.float32),
    "head": rng.normal(size=(INPUTS, CLASSES)).astype(np.float32),
  }
  plan = mj.explain_projection(tied, params, codes_of()[:, 0])
  assert plan.sites == () and set(plan.not_edited) == {"k"} and plan.not_edited["k"]
  with pytest.raises(ValueError, match="depth: got 1; this model has 0 sites"):
    mj.forget(tied, params, codes_of(), [0], method=mj.Projection(depth=1))


def test_all_classes_alone_in_one_call():
  params, codes = draw(), codes_of()
  step = lambda forget: mj.forget_step(
    dense, params, codes, forget, ~forget, mj.Projection(depth=2)
  )
  moved, info = jax.jit(jax.vmap(step))(jnp.eye(CLASSES, dtype=bool))
  np.testing.assert_array_equal(info.code_forget_error, np.ones(CLASSES))
  for c in range(CLASSES):
    alone = mj.forget(dense, params, codes, [c], method=mj.Projection(depth=2))
    assert_trees_close(jax.tree.map(lambda x, c=c: x[c], moved), alone.params, 1e-4, 1e-5)


def test_a_mask_without_a_class_changes_nothing():
  params, codes = draw(), codes_of()
  nobody = jnp.zeros(CLASSES, bool)
  for method in (mj.Projection(depth=3), mj.DropRow()):
    moved, _ = jax.jit(
      lambda forget, method=method: mj.forget_step(dense, params, codes, forget, ~forget, method)
    )(nobody)
    assert_trees_close(moved, params, 0, 0)


# The head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dropped_class_never_wins_and_kept_classes_keep_their_order(dtype):
  rng = np.random.default_rng(1)
  features = rng.normal(size=(2000, 7)).astype(np.float32) * 5
  params = {"kernel": rng.normal(size=(7, CLASSES)), "bias": rng.normal(size=CLASSES)}
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  head = lambda p, x: x.astype(p["kernel"].dtype) @ p["kernel"] + p["bias"]
  moved, _ = mj.forget_step(
    head, params, codes_of()[:, :, 0, :1].repeat(7, -1), FORGET, KEPT, mj.DropRow()
  )
  before, after = (np.asarray(head(p, features), np.float32) for p in (params, moved))
  assert KEPT[after.argmax(-1)].all(), "classes of neither side are dropped too"
  np.testing.assert_array_equal(after[:, KEPT], before[:, KEPT])
  assert_trees_close(
    dict(zip(("kernel", "bias"), (moved["kernel"], moved["bias"]), strict=True)),
    dict(
      zip(
        ("kernel", "bias"),
        reference.row_dropped(params["kernel"], params["bias"], KEPT),
        strict=True,
      )
    ),
    **({"rtol": 1e-6} if dtype == "float32" else {"rtol": 1e-2}),
  )


convolution = functools.partial(
  jax.lax.conv_general_dilated,
  window_strides=(1,),
  padding="VALID",
  dimension_numbers=("NWC", "WIO", "NWC"),
)
HEADS = {
  "log_softmax": lambda p, x: jax.nn.log_softmax(x @ p["w"] + p["b"]),
  "factor": lambda p, x: (x @ p["w"] + p["b"]) / 2.5,
  "mean over positions": lambda p, x: (x[:, None] @ p["w"] + p["b"]).mean(1),
  "class axis first": lambda p, x: (p["w"].T @ x.T).T + p["b"],
  "reshaped": lambda p, x: (x @ p["w"]).reshape(-1, 1, CLASSES)[:, 0] + p["b"],
  "convolution": lambda p, x: (convolution(x[:, None], p["w"][None]) + p["b"]).mean(1),
}


def head_problem():
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {"w": draw(INPUTS, CLASSES), "b": draw(CLASSES)}, draw(CLASSES, 2, INPUTS)


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_keep_the_order_are_dropped(name):
  params, codes = head_problem()
  moved, _ = mj.forget_step(HEADS[name], params, codes, FORGET, KEPT, mj.DropRow())
  kernel, bias = reference.row_dropped(params["w"], params["b"], KEPT)
  assert_trees_close(moved, {"w": kernel, "b": bias}, rtol=1e-5, atol=1e-6)


REFUSED = {
  "cosine": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), "kernel"),
  "negative factor": (lambda p, x: -2.0 * (x @ p["w"] + p["b"]), "order"),
  "relu": (lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]), "order"),
  "two heads": (lambda p, x: x @ p["w"] + jnp.tanh(x) @ p["w2"], "order|head"),
  "used twice": (lambda p, x: x @ p["w"] + 0.1 * p["w"].sum(), "elsewhere|kernel|order"),
  "constant bias": (lambda p, x: x @ p["w"] + jnp.arange(5.0), "bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused_with_the_reason(name):
  model, reason = REFUSED[name]
  params, codes = head_problem()
  params["w2"] = params["w"] + 1
  with pytest.raises(ValueError, match=f"drop_row: .*cannot be dropped: .*({reason})"):
    mj.forget_step(model, params, codes, FORGET, KEPT, mj.DropRow())


def test_a_head_without_a_bias_needs_two_kept_classes():
  params, codes = head_problem()
  no_bias = lambda p, x: x @ p["w"]
  for method in (mj.DropRow(), mj.Projection(depth=0)):
    moved, _ = mj.forget_step(no_bias, {"w": params["w"]}, codes, FORGET, KEPT, method)
    assert_trees_close(moved["w"], reference.row_dropped(params["w"], np.zeros(5), KEPT)[0])
    one = np.arange(CLASSES) == 2
    with pytest.raises(ValueError, match=r"no bias.*one kept class"):
      mj.forget_step(no_bias, {"w": params["w"]}, codes, FORGET, one, method)


def test_without_the_row_the_head_is_cut_by_what_it_reads():
  """A forgotten class's mean gives the head what the kept mean gives it, in the model as it was."""
  params, codes = draw(), codes_of()
  moved, _ = STEP(dense, params, codes, mj.Projection(depth=0, drop_row=False))
  features = np.tanh(reference.residual_net(params, codes)[0]["z3"]).mean((1, 2))
  logits = features @ np.asarray(moved["k7"]) + params["b7"]
  np.testing.assert_allclose(logits[FORGET], np.tile(logits[KEPT].mean(0), (2, 1)), atol=1e-4)
  np.testing.assert_array_equal(moved["b7"], params["b7"])


# Found by a reader who did not write it -----------------------------------------------------------


def forgotten(model, params, codes, method):
  """The edited params, and what the method says."""
  moved, info = jax.jit(
    lambda p, c: mj.forget_step(model, p, c, jnp.asarray(FORGET), jnp.asarray(KEPT), method)
  )(params, codes)
  return host(moved), info


def small(seed=3):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {"w": draw(INPUTS, WIDTH), "b": draw(WIDTH), "h": draw(WIDTH, CLASSES)}
  return params, draw(CLASSES, 2, INPUTS)


def test_without_a_kept_class_nothing_changes():
  params, codes = draw(), codes_of()
  everyone, nobody = np.ones(CLASSES, bool), np.zeros(CLASSES, bool)
  step = jax.jit(lambda f, r: mj.forget_step(dense, params, codes, f, r, mj.Projection(depth=3))[0])
  assert_trees_close(step(everyone, nobody), params, 0, 0)


def normalised(p, x):
  size = jnp.linalg.norm(jax.lax.stop_gradient(p["w"]), axis=0)
  return jax.nn.relu(x @ p["w"] / size + p["b"]) @ p["h"]


def read_elsewhere(p, x):
  more = jax.lax.stop_gradient(p["w"]).sum() * jnp.arange(5.0)
  return jax.nn.relu(x @ p["w"] + p["b"]) @ p["h"] + more


@pytest.mark.parametrize("model", [normalised, read_elsewhere])
def test_a_kernel_that_is_also_read_as_a_constant_is_not_edited(model):
  params, codes = small()
  assert mj.explain_projection(model, params, codes[:, 0]).sites == ()
  with pytest.raises(ValueError, match="0 sites"):
    mj.forget_step(model, params, codes, FORGET, KEPT, mj.Projection(depth=1, drop_row=False))


def test_a_head_inside_a_remat_leaves_the_input_layer_alone():
  model = lambda p, x: jax.checkpoint(lambda z: z @ p["h"])(jax.nn.relu(x @ p["w"] + p["b"]))
  params, codes = small()
  moved, _ = forgotten(model, params, codes, mj.Projection(depth=0, drop_row=False))
  np.testing.assert_array_equal(moved["w"], params["w"])


def test_a_scale_for_each_head_is_a_scale_of_its_channels():
  def model(p, x):
    z = (x @ p["w"]).reshape(-1, 2, WIDTH // 2) * p["s"] + p["b"].reshape(2, -1)
    return jnp.tanh(z).reshape(-1, WIDTH) @ p["h"]

  params, codes = small()
  params["s"] = np.array([[2.0], [0.5]], np.float32)
  moved, _ = forgotten(model, params, codes, mj.Projection(depth=1))
  z = (codes.reshape(-1, INPUTS) @ moved["w"]).reshape(-1, 2, WIDTH // 2) * params["s"]
  mean = (z + moved["b"].reshape(2, -1)).reshape(CLASSES, 2, WIDTH).mean(1)
  np.testing.assert_allclose(mean[FORGET], np.tile(mean[KEPT].mean(0), (2, 1)), atol=1e-4)


def test_a_scan_in_reverse_counts_depth_from_the_head():
  params, codes = stacked_params(), codes_of(2)

  def backwards(params, inputs):
    layers = params["up"], params["down"], params["bias"]
    step = lambda x, layer: (block(x, layer), None)
    x, _ = jax.lax.scan(step, inputs @ params["first"], layers, reverse=True)
    return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]

  flipped = {k: v[::-1] if k in ("up", "down", "bias") else v for k, v in params.items()}
  wanted, _ = STEP(scanned, flipped, codes, mj.Projection(depth=1))
  moved, _ = STEP(backwards, params, codes, mj.Projection(depth=1))
  np.testing.assert_allclose(moved["down"][::-1], wanted["down"], rtol=1e-4, atol=1e-5)
  assert np.array_equal(moved["down"][2], params["down"][2])
  assert not np.array_equal(moved["down"][0], params["down"][0])


def test_what_was_not_cut_is_not_reported():
  _, info = STEP(dense, draw(), codes_of(), mj.Projection(depth=1))
  np.testing.assert_array_equal(info.info["cut"], [0, 0, 0, 0, 1])
  np.testing.assert_array_equal(info.info["rank"], [0, 0, 0, 0, 2])


def test_the_noise_of_a_mean_is_no_direction():
  same = np.tile(means()[:1], (CLASSES, 1))
  found = cut(same)
  assert not as_matrix(found).any() and int(found.rank[0]) == 0


def test_a_large_bias_in_bfloat16_keeps_the_margin():
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(INPUTS, CLASSES)), jnp.bfloat16)}
  params["b"] = jnp.full(CLASSES, 400, jnp.bfloat16)
  model = lambda p, x: x.astype(jnp.bfloat16) @ p["w"] + p["b"]
  moved, info = mj.forget_step(model, params, small()[1], FORGET, KEPT, mj.DropRow())
  inputs = rng.normal(size=(5000, INPUTS)).astype(np.float32)
  assert KEPT[np.asarray(model(moved, inputs)).argmax(-1)].all() and info.info["margin"]


def test_logits_rounded_to_integers_are_no_head():
  model = lambda p, x: (x @ p["h"]).astype(jnp.int32).astype(jnp.float32)
  params, codes = small()
  with pytest.raises(ValueError, match="cannot be dropped"):
    mj.forget_step(model, {"h": params["h"][:INPUTS]}, codes, FORGET, KEPT, mj.DropRow())


def test_under_x64_params_are_edited_as_without():
  params, codes = draw(), codes_of()
  wanted, _ = STEP(dense, params, codes, mj.Projection(depth=2))
  with jax.enable_x64(True):
    moved, _ = forgotten(dense, params, codes, mj.Projection(depth=2))
  assert_trees_close(moved, host(wanted), rtol=1e-4, atol=1e-5)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "error", "words"),
  [
    ({"depth": -1}, ValueError, "depth: got -1"),
    ({"depth": 1.5}, TypeError, "depth: got 1.5"),
    ({"depth": True}, TypeError, "depth: got True"),
    ({"depth": 1, "sites": ("k1",)}, ValueError, "expected one of them"),
    ({"sites": "k1"}, TypeError, "sites: got 'k1'"),
    ({"drop_row": "no"}, TypeError, "drop_row: got 'no'"),
  ],
)
def test_wrong_settings_are_refused(settings, error, words):
  with pytest.raises(error, match=words):
    mj.Projection(**settings)


def test_wrong_sites_are_refused_with_the_nearest_name():
  with pytest.raises(ValueError, match=r"depth: got 4; this model has 3 sites"):
    mj.forget(dense, draw(), codes_of(), [0], method=mj.Projection(depth=4))
  with pytest.raises(ValueError, match=r"sites: got 'k33'.*Did you mean k3"):
    mj.forget(dense, draw(), codes_of(), [0], method=mj.Projection(sites=("k33",)))


# Codes of which only the shape is known ----------------------------------------------------------


def test_dropping_a_row_needs_the_shape_of_codes_alone():
  params, codes = draw(), codes_of()
  shape = jax.ShapeDtypeStruct(codes.shape, codes.dtype)
  found = mj.forget(dense, params, shape, [1], method=mj.DropRow())
  wanted = mj.forget(dense, params, codes, [1], method=mj.DropRow())
  assert_trees_close(found.params, wanted.params)
  assert found.code_retain_accuracy is None and found.code_forget_error is None
  with pytest.raises(TypeError, match=r"codes: got .*; Projection reads codes"):
    mj.forget(dense, params, shape, [1], method=mj.Projection(depth=1))
  with pytest.raises(ValueError, match="params: NaN or inf"):
    mj.forget(dense, {**params, "k7": params["k7"] * jnp.nan}, shape, [1], method=mj.DropRow())


def test_classes_whose_codes_were_removed_are_refused():
  codes = np.array(codes_of())
  codes[1] = 0
  with pytest.raises(ValueError, match=r"classes: got \[1\], whose codes are all zeros"):
    mj.forget(dense, draw(), codes, [1, 2], method=mj.Projection(depth=1))
  mj.forget(dense, draw(), codes, [2], method=mj.Projection(depth=1), forgotten=[1])


def test_masked_sites_and_heads_are_told():
  everything_else = {name: name in ("k7", "b7") for name in draw()}
  plan = mj.explain_projection(dense, draw(), codes_of()[:, 0], mask=everything_else)
  assert not plan.sites and plan.not_edited["k1"] == "masked"
  with pytest.raises(ValueError, match="depth: got 1; this model has 0 sites"):
    method = mj.Projection(depth=1)
    mj.forget(dense, draw(), codes_of(), [1], method=method, mask=everything_else)
  headless = {name: name != "k7" for name in draw()}
  with pytest.raises(ValueError, match="drop_row: the head of this model cannot be dropped"):
    mj.forget(dense, draw(), codes_of(), [1], method=mj.Projection(depth=1), mask=headless)
