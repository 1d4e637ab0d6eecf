"""The Fisher of a model with convolutions, tokens, scanned layers and a tied leaf, on a mesh."""

from __future__ import annotations

import contextlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_trees_close, compiled_programs, cpu_mesh, host, place

import mnemonic_jax as mj
from mnemonic_jax.fisher import sums

P = jax.sharding.PartitionSpec


def loss_fn(params, images, labels):
  """A patch convolution, two scanned and rematerialised layers, a leaf used twice, a head."""
  tokens = jax.lax.conv_general_dilated(
    images, params["patch"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  tokens = tokens.reshape(len(images), -1, tokens.shape[-1]) + params["position"][None]

  @jax.checkpoint
  def layer(h, p):
    return h + jnp.tanh(h @ p["in"] + p["bias"][None, None]) @ p["out"], None

  tokens, _ = jax.lax.scan(layer, tokens, params["layers"])
  tokens = jnp.tanh(tokens @ params["tied"]) @ params["tied"].T
  return mj.softmax_cross_entropy(tokens.mean(1) @ params["head"], labels)


def two_groups(labels):
  sides = [(labels == 0).astype(jnp.float32), (labels != 0).astype(jnp.float32)]
  return jnp.stack(sides) / len(labels)


@cache
def problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)
  params = {
    "patch": draw(2, 2, 3, 8),
    "position": draw(4, 8),
    "layers": {"in": draw(2, 8, 64), "bias": draw(2, 64), "out": draw(2, 64, 8)},
    "tied": draw(8, 8),
    "head": draw(8, 8),
  }
  labels = jnp.asarray(rng.integers(4, size=16), jnp.int32)
  weights, images = two_groups(labels), draw(16, 4, 4, 3)
  single = host(mj.diagonal_fisher(loss_fn, params, images, labels, weights))
  # The two groups differ: an error that makes every class's Fisher the same cannot hide.
  for leaf in jax.tree.leaves(single):
    assert not np.allclose(leaf[0], leaf[1], rtol=0.1)
  return params, images, labels, weights, single


def sharded_like(params, mesh):
  """Every leaf split over the mesh where an axis fits, as an FSDP rule would."""

  def spec(leaf):
    axis = next(
      (i for i, size in reversed(list(enumerate(leaf.shape))) if size % mesh.size == 0), None
    )
    return P(*[None] * axis, "data") if axis is not None else P()

  return jax.tree.map(lambda leaf: place(leaf, mesh, *spec(leaf)), params)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
  "devices", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4)), 8]
)
def test_params_and_batch_on_a_mesh(devices, sharded):
  params, images, labels, weights, single = problem()
  mesh = cpu_mesh(devices)
  params = sharded_like(params, mesh) if sharded else place(params, mesh)
  images, labels = place((images, labels), mesh, "data")
  made = mj.diagonal_fisher(loss_fn, params, images, labels, weights)
  assert_trees_close(made, single, 1e-4, 1e-9)
  for leaf, like in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True):
    assert leaf.sharding.is_equivalent_to(
      jax.sharding.NamedSharding(mesh, P(None, *like.sharding.spec)), leaf.ndim
    )
  if sharded:
    run = jax.jit(lambda *arguments: mj.diagonal_fisher(loss_fn, *arguments))
    assert_trees_close(run(params, images, labels, weights), single, 1e-4, 1e-9)


def test_microbatches_on_a_mesh():
  params, images, labels, weights, single = problem()
  mesh = cpu_mesh(4)
  made = mj.diagonal_fisher(
    loss_fn,
    place(params, mesh),
    *place((images, labels), mesh, "data"),
    weights,
    execution=mj.Execution(6),
  )
  assert_trees_close(made, single, 1e-4, 1e-9)


@pytest.mark.parametrize(
  ("devices", "check_vma", "microbatch"),
  [(4, True, None), (2, True, 3), pytest.param(4, False, None, marks=pytest.mark.long)],
)
def test_shard_map_sums_local_examples(devices, check_vma, microbatch):
  """On other meshes, and without the check: test_fisher.py, with a smaller model."""
  params, images, labels, weights, single = problem()
  execution = mj.Execution(microbatch)

  def local(*arguments):
    return jax.lax.psum(mj.diagonal_fisher(loss_fn, *arguments, execution=execution), "data")

  mapped = jax.shard_map(
    local,
    mesh=cpu_mesh(devices),
    in_specs=(P(), P("data"), P("data"), P(None, "data")),
    out_specs=P(),
    check_vma=check_vma,
  )
  assert_trees_close(jax.jit(mapped)(params, images, labels, weights), single, 1e-4, 1e-9)


def test_forget_on_a_mesh_keeps_the_shardings_and_the_result():
  rng = np.random.default_rng(1)
  codes = jnp.asarray(rng.normal(size=(8, 1, 4, 4, 3)), jnp.float32)
  params, *_ = problem()

  def logits_fn(params, images):
    tokens = jax.lax.conv_general_dilated(
      images, params["patch"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return (
      jnp.tanh(tokens.reshape(len(images), -1, 8) + params["position"][None]).mean(1)
      @ params["head"]
    )

  params = {name: params[name] for name in ("patch", "position", "head")}
  method = mj.Perturbation(1e-2, 10.0)
  single = mj.forget(logits_fn, params, codes, [3], method=method)
  placed = sharded_like(params, cpu_mesh(4))
  made = mj.forget(logits_fn, placed, codes, [3], method=method)
  assert made.info == single.info
  assert_trees_close(made.params, host(single.params), 1e-4, 1e-6)
  assert {n: x.sharding for n, x in made.params.items()} == {
    n: x.sharding for n, x in placed.items()
  }


@pytest.mark.parametrize("chunk_bytes", [1800, pytest.param(2**13, marks=pytest.mark.long)])
def test_the_contraction_of_accelerators_is_the_same(chunk_bytes, monkeypatch):
  """What GPUs and TPUs are given, run here: one, or some examples at a time, the last chunk filled.

  One example of a layer's kernel takes more than 1800 bytes, and three of the patches' fit in.
  """
  params, images, labels, weights, single = problem()
  on_gpu = lambda groups, cpu, default, data, g: default(data, g, groups)
  monkeypatch.setattr(sums, "on_platform", on_gpu)
  monkeypatch.setattr(sums, "CHUNK_BYTES", chunk_bytes)
  jax.clear_caches()
  try:
    made = mj.diagonal_fisher(loss_fn, params, images, labels, weights)
  finally:
    jax.clear_caches()
  assert_trees_close(made, single, 1e-4, 1e-9)


# --- meshes as `jax.make_mesh` makes them, whose axes are explicit


def lookup_loss(params, tokens, labels):
  hidden = jnp.tanh(params["table"][tokens] @ params["w"]).mean(1)
  hidden = hidden + jax.vmap(lambda one: params["kinds"][one])(labels)
  return mj.softmax_cross_entropy(hidden @ params["head"], labels)


def lookup_problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"table": draw(12, 4), "w": draw(4, 4), "kinds": draw(8, 4), "head": draw(4, 8)}
  tokens, labels = rng.integers(12, size=(16, 5)), rng.integers(8, size=16)
  return params, jnp.asarray(tokens, jnp.int32), jnp.asarray(labels, jnp.int32)


# Each way meets each model, and each microbatch; the other pairs where there is time.
WAYS = [
  ("lookup", "concrete", None),
  ("lookup", "jit", 6),
  ("lookup", "set_mesh", None),
  ("everything else", "concrete", 6),
  ("everything else", "jit", None),
  ("everything else", "set_mesh", 6),
]
OTHERS = [(model, how, None if microbatch else 6) for model, how, microbatch in WAYS]


@pytest.mark.parametrize(
  ("model", "how", "microbatch"),
  [*WAYS, *(pytest.param(*way, marks=pytest.mark.long) for way in OTHERS)],
)
def test_replicated_params_and_a_batch_split_over_an_explicit_axis(model, how, microbatch):
  if model == "lookup":
    loss, (params, *batch), weights = lookup_loss, lookup_problem(), ()
    single = host(mj.diagonal_fisher(loss, params, *batch))
  else:
    loss, (params, *batch, groups, single) = loss_fn, problem()
    weights = (groups,)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4])
  assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
  arguments = place(params, mesh), *place(tuple(batch), mesh, "data")
  execution = mj.Execution(microbatch)
  run = lambda *arguments: mj.diagonal_fisher(loss, *arguments, *weights, execution=execution)
  with jax.set_mesh(mesh) if how == "set_mesh" else contextlib.nullcontext():
    made = (jax.jit(run) if how == "jit" else run)(*arguments)
  assert_trees_close(made, single, 1e-4, 1e-9)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(made))


def test_a_loss_on_an_explicit_mesh_is_checked_as_any_other():
  params, tokens, labels = lookup_problem()
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices("cpu")[:4])
  arguments = place(params, mesh), *place((tokens, labels), mesh, "data")
  mean = lambda *arguments: lookup_loss(*arguments).mean()
  with pytest.raises(ValueError, match=r"loss_fn: returned shape \(\)"):
    mj.diagonal_fisher(mean, *arguments)
  coupled = lambda *arguments: lookup_loss(*arguments) * lookup_loss(*arguments).mean()
  with pytest.raises(ValueError, match="examples depend on each other"):
    mj.diagonal_fisher(coupled, *arguments)


# --- programs of a call outside jit


@pytest.mark.parametrize("weighted", [True, False])
def test_a_call_outside_jit_runs_as_few_programs_whatever_the_leaves(weighted):
  """All work on the leaves is in compiled programs: an operation alone would be one of its own."""
  params, tokens, labels = lookup_problem()
  weights, mesh = two_groups(labels), cpu_mesh(4)
  arguments = sharded_like(params, mesh), *place((tokens, labels), mesh, "data")
  more = sharded_like(jax.tree.map(lambda leaf: leaf + 1, params), mesh), *arguments[1:]
  run = lambda arguments: mj.diagonal_fisher(
    lookup_loss, *arguments, *([weights] if weighted else [])
  )
  jax.clear_caches()
  with compiled_programs() as names:
    run(arguments)
  assert len([name for name in names if "fisher_program" in name]) == 1
  assert len(names) <= 8, names
  with compiled_programs() as names:
    run(more)
  assert not names
