"""Models: Flax NNX inside, plain dicts and pure functions outside."""

from __future__ import annotations

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mnemonic_jax as mj
from mnemonic_jax import models
from mnemonic_jax.models import resnet, transformer, vit


@pytest.fixture(scope="module")
def mlp() -> models.Model:
  return models.make("mlp", shape=(4, 4, 1), num_classes=3, hidden=7)


@pytest.fixture(scope="module")
def params(mlp: models.Model) -> dict:
  return mlp.init(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return np.random.default_rng(0).uniform(size=(5, 4, 4, 1)).astype(np.float32)


def numpy_features(params: dict, images: np.ndarray) -> np.ndarray:
  hidden = {name: np.asarray(value, np.float64) for name, value in params["hidden"].items()}
  return 1 / (
    1
    + np.exp(
      -(images.reshape(len(images), -1).astype(np.float64) @ hidden["kernel"] + hidden["bias"])
    )
  )


def test_mlp_logits_equal_a_numpy_computation(mlp, params, images):
  output = {name: np.asarray(value, np.float64) for name, value in params["output"].items()}
  features = numpy_features(params, images)
  logits, _ = mlp.apply(params, {}, images, False)
  np.testing.assert_allclose(mlp.features(params, {}, images), features, rtol=1e-6)
  np.testing.assert_allclose(
    logits, features @ output["kernel"] + output["bias"], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(mlp.logits_fn({})(params, images), logits)


def test_bound_stages_are_those_of_the_state(mlp, params, images):
  found = mlp.stages_fn({})(params, images)
  np.testing.assert_allclose(found["features"], numpy_features(params, images), rtol=1e-5)


def test_an_mlp_computes_in_bfloat16_too(mlp, params, images):
  half = models.make("mlp", shape=(4, 4, 1), num_classes=3, hidden=7, dtype=jnp.bfloat16)
  shapes, _ = jax.eval_shape(half.init, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
  logits, _ = half.apply(params, {}, images, False)
  assert half.features(params, {}, images).dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert 0 < np.max(np.abs(logits - mlp.apply(params, {}, images, False)[0])) < 0.02


def test_params_are_nested_dicts_of_arrays(mlp):
  params, model_state = mlp.init(jax.random.key(0))
  assert model_state == {}

  def walk(node: object) -> None:
    if type(node) is dict:
      for name, child in node.items():
        assert type(name) is str
        walk(child)
    else:
      assert isinstance(node, jax.Array) and node.dtype == jnp.float32

  walk(params)
  assert {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  } == {
    "['hidden']['bias']": (7,),
    "['hidden']['kernel']": (16, 7),
    "['output']['bias']": (3,),
    "['output']['kernel']": (7, 3),
  }


def test_init_depends_on_the_key_alone_and_fills_its_range(mlp):
  first, again, other = (mlp.init(jax.random.key(seed))[0] for seed in (0, 0, 1))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).all()), first, other))
  wide = models.make("mlp", shape=(10, 10), num_classes=10, hidden=400).init(jax.random.key(0))[0]
  for layer, fan_in in (("hidden", 100), ("output", 400)):
    kernel = np.abs(np.asarray(wide[layer]["kernel"]))
    assert fan_in**-0.5 * 0.99 < kernel.max() <= fan_in**-0.5
    assert np.abs(np.asarray(wide[layer]["bias"])).max() <= fan_in**-0.5


def test_apply_is_pure_and_traceable(mlp, params, images):
  before = jax.tree.map(np.array, params)
  eager = mlp.apply(params, {}, images, True)[0]
  jitted = jax.jit(mlp.apply, static_argnums=3)(params, {}, images, True)[0]
  np.testing.assert_allclose(eager, jitted, rtol=1e-6)
  np.testing.assert_array_equal(eager, mlp.apply(params, {}, images, True)[0])
  chex.assert_trees_all_equal(before, params)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
  both = jax.vmap(lambda p: mlp.apply(p, {}, images, False)[0])(stacked)
  np.testing.assert_allclose(both[0], eager, rtol=1e-5, atol=1e-6)
  assert not np.allclose(both[1], eager)


def test_logits_follow_the_params_given(mlp, params, images):
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert not mlp.logits_fn({})(zeros, images).any()
  shifted = {**zeros, mlp.head[0]: {**zeros[mlp.head[0]], "bias": jnp.arange(3.0)}}
  np.testing.assert_array_equal(mlp.logits_fn({})(shifted, images), np.tile(np.arange(3.0), (5, 1)))


def test_pooled_stages_are_means_over_positions():
  spatial = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  pooled = models.pooled(
    {"stage1": jnp.asarray(spatial), "features": jnp.asarray(spatial[:, 0, 0])}
  )
  assert pooled.keys() == {"stage1", "features"}
  np.testing.assert_allclose(
    pooled["stage1"], spatial.astype(np.float64).reshape(2, 64, 4).sum(axis=1) / 64, atol=1e-6
  )
  np.testing.assert_array_equal(pooled["features"], spatial[:, 0, 0])


def test_pooled_half_precision_sums_in_float32():
  stage = jnp.ones((1, 4096, 2), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
  ones = models.pooled({"stage": stage})["stage"]
  assert ones.dtype == jnp.float32
  np.testing.assert_array_equal(ones, np.ones((1, 2)))


def size(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


# The params of the published models with 1000 classes, for images of 224 x 224.
@pytest.mark.parametrize(
  ("name", "published", "stages"),
  [
    ("resnet18", 11_689_512, 5),
    ("resnet50", 25_557_032, 0),  # built like resnext50: its params are enough
    ("resnext50_32x4d", 25_028_904, 5),
    ("vit_ti16", 5_717_416, 13),
    ("swin_t", 28_288_354, 5),
  ],
)
def test_published_sizes(name, published, stages):
  model = models.make(name, shape=(224, 224, 3), num_classes=1000)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  assert size(params) == published
  if not stages:
    return
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  outputs = jax.eval_shape(model.stages, params, model_state, images)
  pooled = jax.eval_shape(models.pooled, outputs)
  assert all(stage.ndim == 2 and stage.shape[0] == 2 for stage in pooled.values())
  features = outputs.pop("features")
  assert features.shape[0] == 2 and features.ndim == 2
  assert len(outputs) == stages
  assert all(stage.shape[0] == 2 and stage.ndim > 2 for stage in outputs.values())
  logits, _ = jax.eval_shape(
    lambda *arguments: model.apply(*arguments, False), params, model_state, images
  )
  assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
  ("name", "published"),
  [
    ("vit_s16", 22_050_664),
    ("vit_b16", 86_567_656),
    ("vit_l16", 304_326_632),
    ("vit_h14", 632_045_800),
  ],
)
def test_published_sizes_of_larger_vits(name, published, monkeypatch):
  """Blocks are alike, so that one and two of them tell the size of any number."""
  letter = name[4]
  width, depth, heads = vit.SIZES[letter]
  sizes = []
  for blocks in (1, 2):
    monkeypatch.setitem(vit.SIZES, letter, (width, blocks, heads))
    model = models.make(name, shape=(224, 224, 3), num_classes=1000)
    sizes.append(size(jax.eval_shape(model.init, jax.random.key(0))[0]))
  assert sizes[0] + (depth - 1) * (sizes[1] - sizes[0]) == published


def fill(shapes):
  """Random numbers in the place of shapes; compiling an init takes seconds."""
  draw = np.random.default_rng(0).normal
  one = lambda path, x: (path[-1].key in ("scale", "var")) + 0.1 * draw(size=x.shape)
  return jax.tree_util.tree_map_with_path(lambda *at: jnp.asarray(one(*at), jnp.float32), shapes)


@cache
def narrow_vit(name="vit_ti16", **options) -> models.Model:
  return models.make(name, shape=(32, 32, 3), num_classes=4, **options)


@cache
def params_of_vit() -> dict:
  return fill(jax.eval_shape(narrow_vit().init, jax.random.key(0))[0])


@cache
def stages_of_vit() -> dict:
  return jax.jit(narrow_vit().stages)(params_of_vit(), {}, images_of_vit())


@pytest.fixture
def make_vit(monkeypatch):
  """Make narrow ViTs of two blocks; "vit_s16" has one."""
  monkeypatch.setitem(vit.SIZES, "ti", (12, 2, 3))
  monkeypatch.setitem(vit.SIZES, "s", (12, 1, 3))
  return narrow_vit


@pytest.fixture
def vit_params(make_vit) -> dict:
  return params_of_vit()


@pytest.fixture
def vit_stages(make_vit) -> dict:
  """The stages of the plain ViT in float32."""
  return stages_of_vit()


@cache
def make_resnet(dtype=None) -> models.Model:
  make = lambda rngs: resnet.ResNet((1, 1), 4, width=4, small_stem=True, dtype=dtype, rngs=rngs)
  return models.functional(make, head=("head",))


@pytest.fixture(scope="module")
def resnet_state() -> tuple[dict, dict]:
  params, model_state = jax.eval_shape(make_resnet().init, jax.random.key(0))
  start = lambda path, x: jnp.full(x.shape, float(path[-1].key == "var"))
  return fill(params), jax.tree_util.tree_map_with_path(start, model_state)


def images_of_vit() -> jax.Array:
  return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


def stacked_blocks(params: dict) -> dict:
  """The params of an unrolled ViT of two blocks as those of a scanned one."""
  rest = {name: value for name, value in params.items() if name not in ("block1", "block2")}
  return rest | {
    "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), params["block1"], params["block2"])
  }


def test_stacked_blocks_are_drawn_one_after_the_other():
  rngs, again = nnx.Rngs(0), nnx.Rngs(0)
  stacked = transformer.stack(lambda: transformer.FeedForward(1, rngs, dtype=None), 2)
  for index in range(2):
    block = transformer.FeedForward(1, again, dtype=None)
    layer = jax.tree.map(lambda leaf, index=index: leaf[index], nnx.state(stacked))
    chex.assert_trees_all_equal(nnx.to_pure_dict(layer), nnx.to_pure_dict(nnx.state(block)))


@pytest.mark.long
def test_a_scanned_model_starts_like_an_unrolled_one(make_vit):
  params, stacked = (make_vit(scan=scan).init(jax.random.key(0))[0] for scan in (False, True))
  chex.assert_trees_all_equal(stacked, stacked_blocks(params))


def test_scanned_blocks_compute_the_same(make_vit, vit_params, vit_stages):
  scanned, stacked = make_vit(scan=True), stacked_blocks(vit_params)
  shapes, _ = jax.eval_shape(scanned.init, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, stacked)
  stages = jax.jit(scanned.stages)(stacked, {}, images_of_vit())
  chex.assert_trees_all_close(stages, vit_stages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.long)])
def test_remat_changes_no_gradient_and_computes_again(make_vit, vit_params, scan):
  name = "vit_ti16" if scan else "vit_s16"
  plain, again = make_vit(name, scan=scan), make_vit(name, scan=scan, remat=True)
  params = stacked_blocks(vit_params) if scan else {**vit_params}
  params.pop("block2", None)
  gradient = lambda model: jax.jit(
    jax.grad(lambda params: jnp.sum(model.logits_fn({})(params, images_of_vit()) ** 2))
  )
  chex.assert_trees_all_close(
    gradient(again)(params), gradient(plain)(params), rtol=1e-4, atol=1e-5
  )
  assert "remat" in str(jax.make_jaxpr(gradient(again))(params))
  assert "remat" not in str(jax.make_jaxpr(gradient(plain))(params))


@pytest.mark.long
def test_a_scanned_and_an_unrolled_model_forget_identically(make_vit, vit_params):
  """Through `Model.layer_axis`, as `mnemonic forget` does."""
  plain, scanned = make_vit(), make_vit(scan=True)
  assert plain.layer_axis is None
  noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape)
  params = jax.tree.map(noisy, vit_params)
  codes = jax.random.normal(jax.random.key(3), (4, 1, 32, 32, 3))

  def forgotten(model: models.Model, params: dict) -> tuple[int, dict]:
    method, axis = mj.Perturbation(1e-2, 1e-1), model.layer_axis
    result = mj.forget(model.logits_fn({}), params, codes, [1], method=method, layer_axis=axis)
    return int(result.info["sign"]), result.params

  sign, unrolled = forgotten(plain, params)
  again, stacked = forgotten(scanned, stacked_blocks(params))
  assert again == sign
  before, wanted = stacked_blocks(params), stacked_blocks(unrolled)
  for tree in (before, wanted, stacked):
    # Softmax ignores the biases of the keys: their Fishers, and so the scale of this leaf, are
    # rounding errors.
    del tree["blocks"]["attention"]["qkv"]["bias"]
  chex.assert_trees_all_close(stacked, wanted, rtol=1e-5, atol=1e-5)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stacked, before)
  assert min(jax.tree.leaves(moved)) > 0.01, moved


def test_mean_pooling_has_no_class_token(make_vit, vit_params):
  model = make_vit(pool="mean")
  shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
  assert "class_token" not in shapes and shapes["positions"].shape == (1, 4, 12)
  assert vit_params["positions"].shape == (1, 5, 12)
  params = {name: vit_params[name] for name in shapes}
  params["positions"] = params["positions"][:, 1:]
  stages = jax.jit(model.stages)(params, {}, images_of_vit())
  last = np.asarray(stages["block2"])
  normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
  wanted = (normed * params["norm"]["scale"] + params["norm"]["bias"]).mean(1)
  np.testing.assert_allclose(stages["features"], wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_params_in_float32(make_vit, vit_params, vit_stages):
  half = make_vit(dtype=jnp.bfloat16)
  shapes, _ = jax.eval_shape(half.init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}

  @jax.jit
  def outputs(params, images):
    return half.features(params, {}, images), half.logits_fn({})(params, images)

  features, logits = outputs(vit_params, images_of_vit())
  assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  wanted = vit_stages["features"] @ vit_params["head"]["kernel"] + vit_params["head"]["bias"]
  np.testing.assert_allclose(logits, wanted, atol=0.1)


def test_a_resnet_in_bfloat16_keeps_params_and_statistics_in_float32(resnet_state):
  half, full = make_resnet(jnp.bfloat16), make_resnet()
  shapes = jax.eval_shape(half.init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
  params, model_state = resnet_state
  images = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))

  @jax.jit
  def outputs(params, model_state, images):
    return half.features(params, model_state, images), half.logits_fn(model_state)(params, images)

  features, logits = outputs(params, model_state, images)
  assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  wanted = applied(full)(params, model_state, images, False)[0]
  np.testing.assert_allclose(logits, wanted, atol=0.1)


@cache
def applied(model: models.Model):
  return jax.jit(model.apply, static_argnums=3)


def test_training_mode_moves_the_running_statistics_alone(resnet_state):
  params, model_state = resnet_state
  inputs = 3 + 2 * jax.random.normal(jax.random.key(1), (64, 8, 8, 3))
  apply = applied(make_resnet())
  _, moved = apply(params, model_state, inputs, True)
  _, same = apply(params, model_state, inputs, False)
  chex.assert_trees_all_equal(same, model_state)
  stem = jax.lax.conv_general_dilated(
    inputs, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  wanted = 0.1 * np.asarray(stem).mean((0, 1, 2))  # from 0, with momentum 0.9
  np.testing.assert_allclose(moved["stem_norm"]["mean"], wanted, rtol=1e-4, atol=1e-5)


def test_shapes_that_a_model_cannot_take_are_refused():
  for name, shape, words in (
    ("vit_b16", (224, 220, 3), r"\(224, 220\); expected multiples of the patch, 16"),
    ("swin_t", (200, 200, 3), r"\(200, 200\); expected a square whose side is a multiple of 224"),
    ("swin_t", (224, 448, 3), r"\(224, 448\); expected a square"),
    ("resnet18", (784,), r"got \(784,\); resnet18 expects \(height, width, channels\)"),
    ("vgg", (32, 32, 3), "'vgg'; expected one of mlp"),
  ):
    with pytest.raises(ValueError, match=words):
      models.make(name, shape=shape, num_classes=10)


def test_a_width_that_the_groups_do_not_divide_is_refused():
  with pytest.raises(ValueError, match="width: got 24; expected a multiple of 16 for 32 groups"):
    models.make("resnext50_32x4d", shape=(32, 32, 3), num_classes=10, width=24)
