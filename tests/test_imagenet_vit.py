"""Training and experiments/imagenet_vit on 8 CPU devices: any mesh trains and forgets the same."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
import types
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import HANG, command, environment
from safetensors.numpy import save_file
from toys import assert_trees_close, host
from weight_files import as_augreg, as_timm

import mnemonic_jax as mj
from mnemonic_jax import models, training
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import pretrained, vit
from mnemonic_jax.multihost import sharding
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import setup

pytest_plugins = ["stream_fixtures"]

SCRIPTS = pathlib.Path(__file__).parents[1] / "experiments" / "imagenet_vit"
sys.path.insert(0, str(SCRIPTS))
import forget as forget_script  # noqa: E402
import job as jobs  # noqa: E402

CLASSES, BATCH, SIDE = 10, 16, 32
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
TABLES = {
  "data": {"name": "imagenet2012", "augment": "resized_crop_flip", "side": SIDE},
  "model": {"name": "vit_ti16", "pool": "mean", "scan": True, "remat": True},
  "codes": {"rate": 0.3},
  "train": {
    "steps": 20,
    "batch_size": BATCH,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
  }
  | {
    "warmup_steps": 2,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "accumulate": 2,
    "ema": 0.9,
  },
}
CONFIG = configs.build("tiny", TABLES)


class Found(NamedTuple):
  losses: list
  trained: dict
  forgotten: dict
  info: mj.ForgetInfo


def synthetic():
  """Pixels that mean nothing; where they lie is what is tested."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3 * BATCH, SIDE, SIDE, 3)).astype(np.uint8)
  split = Split(images, rng.integers(0, CLASSES, len(images)).astype(np.int32))
  names = tuple(map(str, range(CLASSES)))
  return Dataset("imagenet2012", split, split, names, 255, (0.5,) * 3, (0.25,) * 3)


class CompiledForget(NamedTuple):
  """A forget of four strengths, compiled for a mesh."""

  planned: forget_script.Program
  run: jax.stages.Compiled

  @classmethod
  def on(cls, mesh, **changed):
    config = configs.build("tiny", TABLES, changed)
    number = jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
      planned = forget_script.make_program(config, synthetic(), mesh)
      method = mj.Perturbation(number, number)
      return cls(planned, planned.step.lower(*planned.arguments, method).compile())


@cache
def compiled_forget(data, fsdp):
  """In two passes over the codes."""
  return CompiledForget.on(sharding.make_mesh(data, fsdp), **{"execution.microbatch": 8})


def train_and_forget(mesh, forget=None, steps=5):
  """Train, search a strength and forget."""
  dataset, layout = synthetic(), Layout(mesh)
  with layout.used():
    planned = setup.make_program(CONFIG, dataset, layout)
    state, codes = setup.first_state(CONFIG, planned)
    losses = []
    for step in range(steps):
      rows = ((np.arange(BATCH) + step * BATCH) % dataset.train.num_examples).astype(np.int32)
      batch = (dataset.train.images[rows], dataset.train.labels[rows], rows)
      images, labels, placed_rows = layout.place(batch)
      state, metrics = planned.step(state, images, labels, codes, placed_rows, np.int32(step // 3))
      losses.append(float(metrics["loss"]))
    forget = forget or CompiledForget.on(mesh)
    chosen = np.arange(CLASSES) == 3
    codes = forget_script.place_codes(np.asarray(codes), forget.planned)
    grid = mj.Perturbation(np.float32([1e-5, 1e-4, 1e-3, 1e-2]), np.float32([1.0] * 4))
    params, info = forget.run(state.params, state.model_state, codes, chosen, ~chosen, grid)
  return Found(losses, state.params, params, jax.device_get(info))


@pytest.fixture(scope="module")
def alone():
  return train_and_forget(sharding.make_mesh(1, 1, jax.devices()[:1]))


@pytest.mark.parametrize(
  "shape", [pytest.param(s, marks=() if s == (2, 4) else pytest.mark.long) for s in MESHES], ids=str
)
def test_any_mesh_trains_and_forgets_the_same(shape, alone):
  mesh = sharding.make_mesh(*shape)
  found = train_and_forget(mesh, compiled_forget(2, 4) if shape == (2, 4) else None)
  np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
  assert_trees_close(host(found.trained), host(alone.trained), 0, 5e-5)
  assert int(found.info.info["sign"]) == int(alone.info.info["sign"])
  assert float(found.info.method.lambda1) == float(alone.info.method.lambda1) < 1e-2
  # lambda2 = 1 moves weights by up to 1; where two Fishers are rounding alone, so is their ratio.
  assert_trees_close(host(found.forgotten), host(alone.forgotten), 0, 1e-2)
  placed = sharding.tree_shardings(mesh, found.trained)
  for leaf, wanted in zip(*map(jax.tree.leaves, (found.forgotten, placed)), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
  kernels = [tree["head"]["kernel"] for tree in (found.forgotten, found.trained)]
  assert not np.allclose(*kernels, atol=1e-3)


def share(mesh):
  """Bytes of params and of the optimizer's state on each device."""
  state = setup.make_program(CONFIG, synthetic(), Layout(mesh)).state
  size = lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * 4
  return [sum(map(size, jax.tree.leaves(tree))) for tree in (state.params, state.optimizer_state)]


def test_each_device_has_less_the_longer_the_axis_fsdp():
  shares = np.array([share(sharding.make_mesh(*shape)) for shape in ((8, 1), (2, 4), (1, 8))])
  assert np.all(shares[1] < 0.27 * shares[0]) and np.all(shares[2] < 0.52 * shares[1])


def test_sums_over_devices_go_to_the_shards_and_one_layer_at_a_time_is_gathered():
  text = compiled_forget(2, 4).run.as_text()
  found = {
    kind: [
      int(np.prod([int(n) for n in shape.split(",") if n]))
      for result in re.findall(rf" = (.*?) {kind}\(", text)  # one array, or a tuple of them
      for shape in re.findall(r"\[([\d,]*)\]", result)
    ]
    for kind in ("reduce-scatter", "all-reduce", "all-gather")
  }
  width = 192
  shard = 2 * width * 4 * width // 4  # of a kernel of a layer's feed-forward, both sides
  # Two of the feed-forward, and the patches' kernel.
  assert found["reduce-scatter"].count(shard) == 3
  assert max(found["all-reduce"]) == shard  # along the copies
  assert max(found["all-gather"]) == 4 * width * width  # one kernel of one layer


@pytest.mark.parametrize(
  ("mesh", "shares"),
  # One share more where each has copies; all params would be four or eight.
  [((2, 4), 6), pytest.param((1, 8), 5, marks=pytest.mark.long)],
)
def test_a_forget_fits_into_a_few_shares_of_the_params(mesh, shares):
  """Beside them three gathered layers, and the activations of one microbatch's batch gradient."""
  planned, compiled = compiled_forget(*mesh)
  params, model_state = (
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t) for t in planned.arguments[:2]
  )
  logits_fn = planned.model.logits_fn(model_state)
  inputs = jax.ShapeDtypeStruct((-(-CLASSES // 8), SIDE, SIDE, 3), np.float32)
  gradient = jax.jit(
    jax.grad(lambda p, x: mj.softmax_cross_entropy(logits_fn(p, x), np.zeros(len(x), int)).sum())
  )
  activations = gradient.lower(params, inputs).compile().memory_analysis().temp_size_in_bytes
  one_share = sum(4 * x.size for x in jax.tree.leaves(params)) / mesh[1]
  layer = sum(4 * x.size for x in jax.tree.leaves(params["blocks"])) / 12
  found = compiled.memory_analysis()
  used = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
  assert used - found.alias_size_in_bytes <= shares * one_share + 3 * layer + activations


def test_a_forget_that_ends_in_nan_is_refused_there_too():
  """With a stand-in for the compiled program, which `mnemonic_jax.forgetting` tests."""
  method = mj.Perturbation(1e-5, 1e4)
  info = mj.ForgetInfo(method, np.float32(np.nan), np.float32(1), {"sign": np.int32(1)})

  class Compiled:
    lower = compile = lambda self, *_: self
    __call__ = lambda self, *_: ({"w": jnp.ones(2)}, info)

  mesh = sharding.make_mesh(1, 8)
  codes = jax.ShapeDtypeStruct((8, 1, 2), jnp.float32, sharding=sharding.batch_sharding(mesh))
  planned = types.SimpleNamespace(step=Compiled(), arguments=(None, None, codes, None, None))
  job = jobs.Job(CONFIG, types.SimpleNamespace(class_names=("a", "b")), mesh, None)
  trained = types.SimpleNamespace(model_state={}, codes=np.zeros((2, 1, 2), np.float32))
  with pytest.raises(MnemonicError, match=r"lambda1=1e-05.* drives .* NaN or inf"):
    forget_script._one_shot(job, planned, trained, {}, [0], method)


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ({"data": 3}, "got data 3 x fsdp 2 for 8 devices; expected a product of 8"),
    ({"data": 2, "fsdp": 2}, "got data 2 x fsdp 2 for 8 devices"),
    ({"fsdp": 16}, "for 8 devices"),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices(sizes, said):
  with pytest.raises(ValueError, match=said):
    sharding.make_mesh(**sizes)


def test_a_mesh_that_does_not_fit_the_batch():
  config = configs.build("tiny", TABLES, {"train.batch_size": 12})
  with pytest.raises(
    ValueError, match=r"train\.batch_size: got 12 for 8 devices; expected a multiple of 8"
  ):
    setup.make_program(config, synthetic(), Layout(sharding.make_mesh(1, 8)))


def test_more_fsdp_than_a_leaf_allows():
  params = {"kernel": jax.ShapeDtypeStruct((100, 102), np.float32)}
  with pytest.raises(
    ValueError, match=r"fsdp 8 divides no axis of \['kernel'\] \(100, 102\); 4 does"
  ):
    sharding.tree_shardings(sharding.make_mesh(1, 8), params)


def test_layers_of_a_stack_stay_whole():
  params = {
    "blocks": {"kernel": jax.ShapeDtypeStruct((8, 16, 80), np.float32)},
    "bias": jax.ShapeDtypeStruct((8,), np.float32),
  }
  placed = sharding.tree_shardings(sharding.make_mesh(1, 8), params)
  assert placed["blocks"]["kernel"].spec == jax.sharding.PartitionSpec(None, None, "fsdp")
  assert placed["bias"].spec == jax.sharding.PartitionSpec()


def script(name, *arguments, devices):
  """Run a script of experiments/imagenet_vit on so many CPU devices; return its JSON."""
  done = subprocess.run(
    [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
    env=environment() | {"JAX_NUM_CPU_DEVICES": str(devices)},
    capture_output=True,
    text=True,
    timeout=HANG,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def write_config(folder, **train):
  """The tiny config, for pictures of TFDS's, of which there are few."""
  tables = TABLES | {"train": TABLES["train"] | {"batch_size": 8, "accumulate": 1} | train}
  table = lambda name, fields: (
    f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
  )
  (folder / "tiny.toml").write_text("".join(table(name, fields) for name, fields in tables.items()))
  return folder / "tiny.toml"


def metrics(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_goes_on_on_other_devices_and_forgets(tmp_path, prepared_sets):
  """Real Orbax checkpoints, and TFDS's own ImageNet with a few pictures that are not ImageNet's."""
  config = write_config(tmp_path, steps=4, checkpoint_steps=2)
  arguments = (config, "--data-dir", prepared_sets, "--out")
  whole = script("train", *arguments, tmp_path / "whole", "--log-every", 1, "--profile", devices=8)
  assert whole["mesh"] == {"data": 1, "fsdp": 8} and whole["steps"] == 4
  assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))
  shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  resumed = script(
    "train", *arguments, tmp_path / "resumed", "--log-every", 1, "--execution.fsdp", 1, devices=2
  )
  assert resumed["resumed_from_step"] == 2 and resumed["mesh"] == {"data": 2, "fsdp": 1}
  for ours, theirs in zip(
    *(metrics(tmp_path / name) for name in ("resumed", "whole")), strict=True
  ):
    assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(
      theirs["loss"], rel=1e-5
    )
    assert {
      "images_per_second_per_device",
      "step_seconds",
      "input_seconds",
      "checkpoint_seconds",
    } <= set(ours)
  words = (tmp_path / "whole", "--classes", 1, "--data-dir", prepared_sets)
  words += ("--forget.method", "perturbation", "--forget.settings.lambda1", 1e-3)
  words += ("--forget.settings.lambda2", 10.0)
  on_mesh = script("forget", *words, devices=4)
  on_one = command("forget", *words, "--json").json
  assert on_mesh["params_sha256_before"] == on_one["params_sha256_before"]
  same = (
    "classes",
    "codes_sha256",
    "method",
    "info",
    "retain_accuracy_after",
    "forget_error_after",
  )
  assert {name: on_mesh[name] for name in same} == {name: on_one[name] for name in same}
  assert (tmp_path / "whole" / "forgets" / "0001" / "report.html").is_file()


def drawn():
  """Params of the ViT of the config, unrolled, at random."""
  model = models.make("vit_ti16", shape=(SIDE, SIDE, 3), num_classes=CLASSES, pool="mean")
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.normal(0, 0.02, leaf.shape).astype(np.float32)
  return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0))[0])


@pytest.fixture
def weights_file(tmp_path, monkeypatch):
  """A ViT of two blocks and 10 classes as timm would save it."""
  monkeypatch.setitem(vit.SIZES, "ti", (192, 2, 3))
  save_file(as_timm(drawn()), tmp_path / "timm.safetensors")
  return tmp_path / "timm.safetensors"


def program_from(weights_file, mesh, changed):
  """A config that starts from a file, and its program."""
  config = configs.build("tiny", TABLES, {"model.pretrained": str(weights_file)} | changed)
  return config, setup.make_program(config, synthetic(), Layout(mesh))


def assert_same_bits(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, host(ours), host(theirs))


def assert_placed(tree, shardings):
  for leaf, placed in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True):
    assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)


def first_state_from(weights_file, changed):
  """That of train.py on eight devices, and the shards that all of it has by the table of rules."""
  mesh = sharding.make_mesh(2, 4)
  with jax.set_mesh(mesh):
    config, planned = program_from(weights_file, mesh, changed)
    state, codes = setup.first_state(config, planned)
  assert_placed(state, sharding.tree_shardings(mesh, state))
  assert_same_bits(training.ema_params(state), state.params)
  return config, state, codes


def test_a_file_goes_to_the_shards_as_to_one_device(weights_file):
  config, state, _ = first_state_from(weights_file, {"model.scan": False})
  shapes, _ = jax.eval_shape(setup.make_model(config, synthetic()).init, jax.random.key(0))
  assert_same_bits(state.params, pretrained.load(weights_file, "vit_ti16", shapes, {})[0])
  kernel = state.params["block1"]["feed_forward"]["hidden"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


@pytest.mark.long
def test_a_file_with_a_new_head_starts_as_mnemonic_train_does(weights_file):
  config, state, codes = first_state_from(weights_file, {"model.new_head": True})
  fresh, fresh_codes = setup.make_program(config, synthetic()).init()
  wanted = pretrained.load(weights_file, "vit_ti16", fresh.params, {}, new_head=True)[0]
  assert_same_bits(state.params, wanted)
  assert_same_bits(state.params["head"], fresh.params["head"])
  assert_same_bits(codes, fresh_codes)
  assert_same_bits(*(jax.random.key_data(s.key) for s in (state, fresh)))
  assert int(state.step) == 0


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_shapes_that_say_where_they_lie_are_enough_and_no_device_passes_weights_on(
  scan, weights_file
):
  mesh = sharding.make_mesh(1, 8)
  model = models.make(
    "vit_ti16", shape=(SIDE, SIDE, 3), num_classes=CLASSES, pool="mean", scan=scan
  )
  shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
  placed = Layout(mesh).abstract(shapes)
  with jax.transfer_guard_device_to_device(
    "disallow_explicit"
  ):  # straight from the host to the shards
    params, _ = pretrained.load(weights_file, "vit_ti16", placed, {})
  assert_same_bits(params, pretrained.load(weights_file, "vit_ti16", shapes, {})[0])
  assert_placed(params, jax.tree.map(lambda shape: shape.sharding, placed))


@pytest.mark.parametrize(
  ("changed", "said", "compiled"),
  [
    (
      {"model.name": "vit_s16"},
      r"timm\.safetensors: .* has shape \(192, 768\) there; vit_s16 .* expects \(384, 1536\)",
      True,
    ),
    (
      {"model.name": "resnet18", "model.scan": False, "model.remat": False},
      "holds no resnet18 in a known format",
      False,
    ),
    ({"model.pretrained": "absent.npz"}, r"absent\.npz: no such file", False),
  ],
  ids=["another size", "another architecture", "no file"],
)
def test_a_file_that_does_not_fit_is_refused_by_name_on_a_mesh(
  changed, said, compiled, weights_file
):
  """And before anything is compiled, where its names alone tell it."""
  mesh = sharding.make_mesh(1, 8)
  config, planned = program_from(weights_file, mesh, changed)
  shapes = lambda: (
    (planned.state, planned.codes) if compiled else pytest.fail("the first state was made")
  )
  with jax.set_mesh(mesh), pytest.raises(MnemonicError, match=said):
    setup.first_state(config, planned._replace(init=shapes))


@pytest.mark.long
def test_training_starts_from_a_file_as_mnemonic_train_does(tmp_path, prepared_sets):
  """The 1,000 classes of the data set get a new head."""
  np.savez(tmp_path / "augreg.npz", **as_augreg(drawn()))
  config = write_config(tmp_path, steps=3, checkpoint_steps=1)
  start = (
    "--model.pretrained",
    tmp_path / "augreg.npz",
    "--model.new_head",
    "true",
    "--data-dir",
    prepared_sets,
  )
  result = script("train", config, *start, "--out", tmp_path / "mesh", "--log-every", 1, devices=8)
  assert result["mesh"] == {"data": 1, "fsdp": 8} and result["steps"] == 3
  one = command("train", config, *start, "--out", tmp_path / "one", "--json").json
  assert one["codes_sha256"] == result["codes_sha256"]
  losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in ("mesh", "one")]
  assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
  np.testing.assert_allclose(*losses, rtol=1e-5)
