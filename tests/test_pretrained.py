"""Imported weights: random torchvision and timm models keep their logits; bad files are refused."""

from __future__ import annotations

import contextlib
import pathlib
import pickle
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import call
from safetensors.numpy import save_file
from weight_files import as_augreg

from mnemonic_jax import _trees, models
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import pretrained, vit
from mnemonic_jax.runs.checkpoints import newest, restore_parts, stored_shapes

try:
  import torch
except ImportError:
  torch = None
IMAGE = (224, 224, 3)

# (our name, library, its name)
MODELS = [
  ("resnet18", "torchvision", "resnet18"),
  ("resnet18", "timm", "resnet18"),
  ("resnet50", "torchvision", "resnet50"),
  ("resnext50_32x4d", "timm", "resnext50_32x4d"),
  ("vit_ti16", "timm", "vit_tiny_patch16_224"),
  ("vit_s16", "timm", "vit_small_patch16_224"),
  ("vit_b16", "torchvision", "vit_b_16"),
  ("swin_t", "timm", "swin_tiny_patch4_window7_224"),
  ("swin_t", "torchvision", "swin_t"),
]


@cache
def library(name: str) -> Any:
  """torchvision or timm. Beside torch for CPU, torchvision's CUDA wheel lacks two operations."""
  declared = torch.library.Library("torchvision", "FRAGMENT")
  for operation in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # torchvision brought its own
      declared.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  return pytest.importorskip(name, reason="needs the torch extra")


def build(where: str, name: str) -> Any:
  torch.manual_seed(0)
  module = library(where)
  model = (
    module.create_model(name) if where == "timm" else getattr(module.models, name)(weights=None)
  )
  with torch.no_grad():
    # Biases and class tokens start at 0 and scales at 1, which would hide mix-ups.
    for parameter in model.parameters():
      parameter.add_(0.02 * torch.randn_like(parameter))
    for key, buffer in model.named_buffers():
      if key.endswith(("running_mean", "running_var")):
        buffer.add_(0.1 * torch.rand_like(buffer))
  return model.eval()


def template(name: str, shape=IMAGE) -> tuple[models.Model, Any, Any]:
  model = models.make(name, shape=shape, num_classes=1000)
  return model, *jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.skipif(torch is None, reason="needs the torch extra")
@pytest.mark.parametrize(
  ("name", "where", "theirs"), MODELS, ids=[f"{m[1]}-{m[2]}" for m in MODELS]
)
def test_logits_agree(name, where, theirs, tmp_path):
  reference = build(where, theirs)
  save_file(
    {key: value.numpy() for key, value in reference.state_dict().items()},
    tmp_path / "model.safetensors",
  )
  model, *trees = template(name)
  params, model_state = pretrained.load(tmp_path / "model.safetensors", name, *trees)
  images = np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)
  with torch.no_grad():
    wanted = reference(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  logits = jax.jit(model.logits_fn(model_state))(params, images)
  assert np.std(wanted) > 0.05 and np.std(wanted[0] - wanted[1]) > 1e-3
  np.testing.assert_allclose(logits, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))


@pytest.fixture
def small_vit(monkeypatch) -> tuple[models.Model, dict, dict]:
  """A narrow ViT of two blocks with random params."""
  monkeypatch.setitem(vit.SIZES, "ti", (12, 2, 3))
  model = make_small()
  shapes, model_state = jax.eval_shape(model.init, jax.random.key(0))
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), jnp.float32), shapes)
  return model, params, model_state


def make_small(**options: Any) -> models.Model:
  return models.make("vit_ti16", shape=(32, 32, 3), num_classes=5, **options)


def test_an_augreg_file_gives_every_param_back(small_vit, tmp_path):
  _, params, model_state = small_vit
  np.savez(tmp_path / "augreg.npz", **as_augreg(params))
  blank = jax.tree.map(lambda x: np.zeros_like(x), params)
  read, _ = pretrained.load(tmp_path / "augreg.npz", "vit_ti16", blank, model_state)
  jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_scanned_model_is_filled_layer_by_layer(small_vit, tmp_path):
  _, params, _ = small_vit
  np.savez(tmp_path / "augreg.npz", **as_augreg(params))
  blank = jax.eval_shape(make_small(scan=True).init, jax.random.key(0))
  read, _ = pretrained.load(tmp_path / "augreg.npz", "vit_ti16", *blank)
  for index in range(2):
    block = jax.tree.map(lambda leaf, index=index: leaf[index], read["blocks"])
    jax.tree.map(np.testing.assert_array_equal, block, params[f"block{index + 1}"])
  jax.tree.map(np.testing.assert_array_equal, read["head"], params["head"])
  refuse_another_depth(params, blank, tmp_path / "augreg.npz")


def refuse_another_depth(params: dict, trees: tuple[Any, Any], file: pathlib.Path) -> None:
  """A file that lacks a block, and one that has a block too many."""
  arrays = as_augreg(params)
  np.savez(file, **{name: x for name, x in arrays.items() if "encoderblock_1/" not in name})
  assert "no array for block2." in refusal(file, "vit_ti16", trees)
  more = {"Transformer/encoderblock_2/LayerNorm_0/bias": np.zeros(12, np.float32)}
  np.savez(file, **arrays, **more)
  assert "no place for: block3.norm1.bias" in refusal(file, "vit_ti16", trees)


def test_a_head_of_another_size_is_refused_and_a_new_head_is_ours(small_vit, tmp_path):
  _, params, model_state = small_vit
  np.savez(tmp_path / "augreg.npz", **as_augreg(params))
  other = {**params, "head": {"kernel": jnp.ones((12, 7)), "bias": jnp.ones(7)}}
  with pytest.raises(
    MnemonicError, match=r"head\.kernel has shape \(12, 5\) there; .* expects \(12, 7\).*new_head"
  ):
    pretrained.load(tmp_path / "augreg.npz", "vit_ti16", other, model_state)
  read, _ = pretrained.load(tmp_path / "augreg.npz", "vit_ti16", other, model_state, new_head=True)
  np.testing.assert_array_equal(read["head"]["kernel"], other["head"]["kernel"])
  np.testing.assert_array_equal(read["norm"]["scale"], params["norm"]["scale"])


def refusal(file: pathlib.Path, name: str, tree: tuple[Any, Any]) -> str:
  with pytest.raises(MnemonicError) as caught:
    pretrained.load(file, name, *tree)
  message = str(caught.value)
  assert str(file) in message and len(message) < 600
  return message


def test_other_architectures_are_refused_by_name(small_vit, tmp_path):
  _, params, model_state = small_vit
  file = tmp_path / "augreg.npz"
  np.savez(file, **as_augreg(params))
  another = template("resnet18", (32, 32, 3))[1:]
  assert "holds no resnet18 in a known format" in refusal(file, "resnet18", another)
  refuse_another_depth(params, (params, model_state), file)


def test_damaged_and_dangerous_files_are_refused(small_vit, tmp_path):
  _, params, model_state = small_vit
  trees = params, model_state
  assert "no such file" in refusal(tmp_path / "none.safetensors", "vit_ti16", trees)
  whole = tmp_path / "whole.safetensors"
  save_file({name: np.zeros(3, np.float32) for name in ("a", "blocks.0.attn.qkv.weight")}, whole)
  cut = tmp_path / "cut.safetensors"
  cut.write_bytes(whole.read_bytes()[:-5])
  assert "cannot be read" in refusal(cut, "vit_ti16", trees)
  bomb = tmp_path / "bomb.safetensors"
  bomb.write_bytes((2**60).to_bytes(8, "little") + b"{}")
  assert "cannot be read" in refusal(bomb, "vit_ti16", trees)
  for header in (
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}',  # beyond the file
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
    b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}',  # fewer bytes than the shape needs
    b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"O","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',  # two at one place
    b'{"a":' + b"[" * 100_000,
    b'{"a":{"dtype":"F32"',
    b"\xff\xfe",
    b"",
  ):
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    assert "cannot be read" in refusal(evil, "vit_ti16", trees), header[:80]
  cut.write_bytes(b"\1\2\3")  # not even a length
  assert "cannot be read" in refusal(cut, "vit_ti16", trees)
  np.savez(tmp_path / "whole.npz", **as_augreg(params))
  cut = tmp_path / "cut.npz"
  cut.write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
  assert "cannot be read" in refusal(cut, "vit_ti16", trees)


@pytest.mark.parametrize(
  "dtype", [np.uint8, *(pytest.param(d, marks=pytest.mark.long) for d in (np.int32, np.bool_))]
)
def test_weights_that_are_no_floats_or_not_finite_are_refused(dtype, small_vit, tmp_path):
  _, params, model_state = small_vit
  file = tmp_path / "weights.safetensors"
  arrays = {name: np.asarray(leaf) for name, leaf in _trees.by_path(params).items()}
  save_file(arrays | {"head.kernel": arrays["head.kernel"].astype(dtype)}, file)
  message = refusal(file, "vit_ti16", (params, model_state))
  assert f"head.kernel has dtype {np.dtype(dtype)} there; expected floating weights" in message
  arrays["head.bias"] = np.full_like(arrays["head.bias"], np.nan)
  save_file(arrays, file)
  assert "head.bias holds NaN, inf or numbers beyond float32; expected finite weights" in refusal(
    file, "vit_ti16", (params, model_state)
  )
  arrays["head.bias"] = np.full(arrays["head.bias"].shape, 1e300)  # float32 would make it inf
  save_file(arrays, file)
  assert "head.bias holds NaN, inf or numbers beyond float32; expected finite weights" in refusal(
    file, "vit_ti16", (params, model_state)
  )


class Trap:
  sprung = False

  def __reduce__(self):
    return (setattr, (Trap, "sprung", True))


def test_nothing_is_unpickled(small_vit, tmp_path):
  _, params, model_state = small_vit
  arrays = as_augreg(params) | {"cls": np.array([Trap()], dtype=object)}
  np.savez(tmp_path / "pickled.npz", **arrays)
  assert "cannot be read" in refusal(tmp_path / "pickled.npz", "vit_ti16", (params, model_state))
  (tmp_path / "model.pth").write_bytes(pickle.dumps(Trap()))
  assert "neither .safetensors nor .npz" in refusal(
    tmp_path / "model.pth", "vit_ti16", (params, model_state)
  )
  assert not Trap.sprung


def as_torch(width: int, classes: int) -> dict[str, np.ndarray]:
  """The state dict of a ResNet of one block for images of one channel, with a 3x3 stem."""
  draw = np.random.default_rng(0).normal
  arrays = {"conv1.weight": draw(size=(width, 1, 3, 3))}
  arrays |= {f"layer1.0.conv{index}.weight": draw(size=(width, width, 3, 3)) for index in (1, 2)}
  for norm in ("bn1", "layer1.0.bn1", "layer1.0.bn2"):
    arrays |= {f"{norm}.{name}": draw(size=width) for name in ("weight", "bias", "running_mean")}
    arrays |= {
      f"{norm}.running_var": 1 + draw(size=width) ** 2,
      f"{norm}.num_batches_tracked": np.array(7),
    }
  arrays |= {"fc.weight": draw(size=(classes, width)), "fc.bias": draw(size=classes)}
  return {name: x.astype(np.float32) if x.dtype == float else x for name, x in arrays.items()}


def test_training_starts_from_a_file(tmp_path, monkeypatch):
  monkeypatch.setitem(models._RESNETS, "resnet10_small", {"depths": (1,), "small_stem": True})
  file, arrays = tmp_path / "model.safetensors", as_torch(4, 10)
  save_file(arrays, file)
  small = ("--model.name", "resnet10_small", "--model.width", 4, "--model.pretrained", file)
  still = ("--train.learning_rate", 0, "--train.epochs", 1, *small)

  trained = call("train", "digits_paper", "--out", tmp_path / "run", *still, "--train.ema", 0.999)
  assert trained.code == 0, trained.err
  checkpoint = newest(tmp_path / "run" / "checkpoints")
  stored = stored_shapes(checkpoint)
  parts = {name: stored[name] for name in ("params", "optimizer_state")}
  params, optimizer_state = (restore_parts(checkpoint, parts)[name] for name in parts)
  stem = arrays["conv1.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params["stem"]["kernel"], stem)
  np.testing.assert_array_equal(
    params["stage1_block1"]["norm2"]["scale"], arrays["layer1.0.bn2.weight"]
  )
  np.testing.assert_array_equal(params["head"]["kernel"], arrays["fc.weight"].T)
  average = optimizer_state["average"]["stem"]["kernel"]
  np.testing.assert_allclose(average, stem, rtol=1e-4)
  other = {"fc.weight": np.zeros((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)}
  save_file({**arrays, **other}, file)
  refused = call("train", "digits_paper", "--out", tmp_path / "refused", *still)
  assert "head.kernel has shape (4, 3) there" in refused.refusal()


def test_weights_in_the_place_of_uncommitted_arrays_are_uncommitted(small_vit, tmp_path):
  _, params, model_state = small_vit
  np.savez(tmp_path / "augreg.npz", **as_augreg(params))
  read, _ = pretrained.load(tmp_path / "augreg.npz", "vit_ti16", params, model_state)
  assert not any(leaf.committed for leaf in jax.tree.leaves((params, read)))
