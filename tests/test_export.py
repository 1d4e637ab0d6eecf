"""Export of forgotten params to safetensors: every bit comes back, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import call, snapshot
from safetensors import safe_open
from safetensors.numpy import load_file

from mnemonic_jax import models
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import pretrained
from mnemonic_jax.runs.checkpoints import restore_parts, stored_shapes
from mnemonic_jax.runs.files import params_sha256

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)  # as in test_cli_errors


def template(hidden: int = 32, classes: int = 10) -> tuple[dict, dict]:
  """The shapes of an MLP."""
  model = models.make("mlp", shape=(8, 8, 1), num_classes=classes, hidden=hidden)
  return jax.eval_shape(model.init, jax.random.key(7))


def test_an_export_gives_every_bit_back(forgotten_once, tmp_path):
  file = tmp_path / "model.safetensors"
  before = snapshot(forgotten_once)
  result = call("export", forgotten_once, "--out", file, "--json").json
  assert snapshot(forgotten_once) == before and list(tmp_path.iterdir()) == [file]
  report = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  assert (result["file"], result["classes"], result["arrays"]) == (str(file), [3], 4)
  assert result["params_sha256"] == report["params_sha256_after"]
  with safe_open(file, framework="numpy") as opened:
    assert set(opened.keys()) == {
      f"{layer}.{name}" for layer in ("hidden", "output") for name in ("kernel", "bias")
    }
    metadata = opened.metadata()
  assert metadata == {
    "config": "digits_paper",
    "classes": "[3]",
    "params_sha256": report["params_sha256_after"],
  }
  params, model_state = pretrained.load(file, "mlp", *template())
  assert (
    params_sha256(jax.device_get(params)) == report["params_sha256_after"] and model_state == {}
  )


def test_which_forget_is_exported(forgotten, tmp_path):
  assert call("forget", forgotten, "--classes", 5).code == 0
  latest = call("export", forgotten, "--out", tmp_path / "latest.safetensors", "--json").json
  first = call(
    "export", forgotten, "--out", tmp_path / "first.safetensors", "--number", 1, "--json"
  ).json
  assert (latest["classes"], first["classes"]) == ([3, 5], [3])
  assert latest["params_sha256"] != first["params_sha256"]
  text = call("export", forgotten, "--out", tmp_path / "text.safetensors")
  assert (
    text.out.startswith("exported 4 arrays of ") and "(forgot 3, 5)" in text.out and text.err == ""
  )
  message = call("export", forgotten, "--out", tmp_path / "no.safetensors", "--number", 9).refusal(
    2
  )
  assert "--number: got 9; this run has 1, 2." in message


def test_training_goes_on_from_an_export(forgotten_once, tmp_path):
  file = tmp_path / "model.safetensors"
  result = call("export", forgotten_once, "--out", file, "--json").json
  still = (
    "--train.learning_rate",
    0,
    "--train.epochs",
    1,
    "--model.hidden",
    32,
    "--model.pretrained",
    file,
  )
  trained = call("train", "digits_paper", "--out", tmp_path / "run", *still, "--json").json
  assert trained["params_sha256"] == result["params_sha256"]


def test_other_models_are_refused_and_a_new_head_is_ours(forgotten_once, tmp_path):
  file = tmp_path / "model.safetensors"
  assert call("export", forgotten_once, "--out", file).code == 0
  with pytest.raises(
    MnemonicError, match=r"hidden\.kernel has shape \(64, 32\) there; .* expects \(64, 16\)"
  ):
    pretrained.load(file, "mlp", *template(hidden=16))
  with pytest.raises(
    MnemonicError,
    match=r"output\.kernel has shape \(32, 10\) there; .* expects \(32, 7\).*new_head",
  ):
    pretrained.load(file, "mlp", *template(classes=7))
  with pytest.raises(MnemonicError, match="holds no vit_ti16"):
    pretrained.load(file, "vit_ti16", *template())
  ours = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 3.0), template(classes=7)[0])
  params, _ = pretrained.load(file, "mlp", ours, {}, new_head=True)
  np.testing.assert_array_equal(params["output"]["kernel"], ours["output"]["kernel"])
  np.testing.assert_array_equal(params["hidden"]["kernel"], load_file(file)["hidden.kernel"])


RESNET = (
  "--model.name",
  "resnet10_small",
  "--model.width",
  4,
  "--train.batch_size",
  512,
  "--train.epochs",
  1,
)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The model classifies")  # two steps teach it no code
def test_the_model_state_goes_along(tmp_path, monkeypatch):
  """From a run, and from the folder that a plain checkpoint's forget made."""
  monkeypatch.setitem(models._RESNETS, "resnet10_small", {"depths": (1,), "small_stem": True})
  model = models.make("resnet10_small", shape=(8, 8, 1), num_classes=10, width=4)
  blank = jax.tree.map(np.zeros_like, model.init(jax.random.key(0)))
  run, file = tmp_path / "run", tmp_path / "run.safetensors"
  assert call("run", "digits_paper", "--out", run, *RESNET).code == 0
  result = call("export", run, "--out", file, "--json").json
  (checkpoint,) = (run / "checkpoints").glob("*/default")
  stored = stored_shapes(checkpoint)
  parts = restore_parts(
    checkpoint, {name: stored[name] for name in ("params", "model_state", "codes")}
  )
  params, model_state = pretrained.load(file, "resnet10_small", *blank)
  assert params_sha256(jax.device_get(params)) == result["params_sha256"]
  jax.tree.map(np.testing.assert_array_equal, model_state, parts["model_state"])
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(model_state))

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "plain", parts)
  words = ("--config", "digits_paper", *RESNET[:4], "--classes", 0, "--out", tmp_path / "out")
  assert (
    call("forget", tmp_path / "plain", *words, "--json").json["params_sha256_after"]
    == result["params_sha256"]
  )
  assert call("export", tmp_path / "out", "--out", tmp_path / "plain.safetensors").code == 0
  jax.tree.map(
    np.testing.assert_array_equal, load_file(tmp_path / "plain.safetensors"), load_file(file)
  )
  assert "--number" in call(
    "export", tmp_path / "out", "--out", tmp_path / "no.safetensors", "--number", 1
  ).refusal(2)
  # Another model state than that of the params which were forgotten.
  other = jax.tree.map(lambda leaf: leaf + 1, parts["params"])
  shutil.move(tmp_path / "plain", tmp_path / "moved")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "plain", parts | {"params": other})
  message = call("export", tmp_path / "out", "--out", tmp_path / "no.safetensors").refusal()
  assert (
    "is not the checkpoint that was forgotten from" in message
    and not (tmp_path / "no.safetensors").exists()
  )
  shutil.rmtree(tmp_path / "plain")
  message = call("export", tmp_path / "out", "--out", tmp_path / "no.safetensors").refusal()
  assert "which is gone. Put it back" in message and not (tmp_path / "no.safetensors").exists()


def test_bad_requests_change_nothing(forgotten, trained_once, tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_text("mine")
  assert "is there already" in call("export", forgotten, "--out", file).refusal()
  assert file.read_text() == "mine"
  assert "ends in .safetensors" in call(
    "export", forgotten, "--out", tmp_path / "model.npz"
  ).refusal(2)
  new = tmp_path / "new.safetensors"
  assert "no finished forget" in call("export", trained_once, "--out", new).refusal()
  assert "no such run folder" in call("export", tmp_path / "nothing", "--out", new).refusal()
  assert (
    "cannot be written"
    in call("export", forgotten, "--out", tmp_path / "no" / "new.safetensors").refusal()
  )
  report = forgotten / "forgets" / "0001" / "report.json"
  whole = json.loads(report.read_text())
  report.write_text(json.dumps(whole | {"params_sha256_after": "0" * 64}))
  assert "its SHA-256 differs" in call("export", forgotten, "--out", new).refusal()
  report.write_text(json.dumps({"classes": [3]}))
  assert "missing" in call("export", forgotten, "--out", new).refusal()
  assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.safetensors"]


def test_the_disk_is_full(disk, forgotten_once):
  filler = disk.leave(4)
  message = call("export", forgotten_once, "--out", disk.path / "model.safetensors").refusal()
  assert "model.safetensors: cannot be written" in message and "No space left on device" in message
  assert [path.name for path in disk.path.iterdir()] == ["filler"]
  filler.unlink()
  assert call("export", forgotten_once, "--out", disk.path / "model.safetensors").code == 0
