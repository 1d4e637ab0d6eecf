"""Forget in a checkpoint of a user's own training loop: a run's result, or one clear refusal."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import FORGET_KEYS, TINY, call, command, snapshot
from toys import cpu_mesh, place

import mnemonic_jax as mj
from mnemonic_jax import data, models
from mnemonic_jax import report as reports
from mnemonic_jax.runs.checkpoints import newest, restore_parts, stored_shapes
from mnemonic_jax.runs.files import params_sha256

pytest_plugins = ["run_fixtures"]
# Callbacks of Orbax's threads after a failed read or write; the commands hush them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = ("--config", "digits_paper", "--model.hidden", 32)


def save(folder: pathlib.Path, tree: dict) -> pathlib.Path:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)
  return folder


def forget(checkpoint: pathlib.Path, out: pathlib.Path, *more: object) -> tuple[object, ...]:
  return ("forget", checkpoint, *CONFIG, "--classes", 3, "--out", out, *more)


@pytest.fixture(scope="module")
def tree(trained_once: pathlib.Path) -> dict:
  """Params and codes of the tiny training, as a user's own loop has them, with unused entries."""
  checkpoint = newest(trained_once / "checkpoints")
  stored = stored_shapes(checkpoint)
  parts = restore_parts(checkpoint, {name: stored[name] for name in ("params", "codes")})
  momentum = jax.tree.map(np.ones_like, parts["params"])
  return {**parts, "optimizer": [momentum, ()], "step": 132, "note": {}}


def test_the_result_is_that_of_a_run_and_the_checkpoint_is_not_touched(
  tree, forgotten_once, tmp_path
):
  """In a process of its own, whose stderr must stay empty."""
  checkpoint, out = save(tmp_path / "plain", tree), tmp_path / "results" / "three"
  before = snapshot(checkpoint)
  outcome = command(*forget(checkpoint, out, "--json"))
  result = outcome.json
  assert outcome.err == "" and snapshot(checkpoint) == before
  assert sorted(path.name for path in out.parent.iterdir()) == ["three"]
  theirs = forgotten_once / "forgets" / "0001"
  assert sorted(path.name for path in out.iterdir()) == sorted(
    path.name for path in theirs.iterdir()
  )
  assert out.stat().st_mode & 0o777 == 0o755
  report, evidence = (
    json.loads((out / f"{name}.json").read_text()) for name in ("report", "evidence")
  )
  reports.validate(report, evidence)
  assert result == {**report, "folder": str(out), "report": str(out / "report.html")}
  assert report.keys() >= FORGET_KEYS and report["checkpoint"] == str(checkpoint)
  expected = json.loads((theirs / "report.json").read_text())
  for name in set(expected) - {"seconds", "checkpoint", "time"}:
    assert report[name] == expected[name], name
  assert (
    params_sha256(restore_parts(out / "params", stored_shapes(out / "params")))
    == report["params_sha256_after"]
  )


def test_an_average_of_the_params_is_forgotten_too(tree, tmp_path):
  """That of a loop of one's own, and that of a checkpoint of ours."""
  average = jax.tree.map(lambda x: 0.9 * x, tree["params"])
  forms = {
    "own": {"ema_params": average},
    "ours": {"optimizer_state": {"inner": (), "average": average}},
  }
  loss = {"optimizer_state": {"average": np.float32(0.5)}}  # an average of something else
  checkpoint = save(tmp_path / "loss", {**tree, **loss})
  assert "copies" not in call(*forget(checkpoint, tmp_path / "loss out", "--json")).json
  for name, form in forms.items():
    checkpoint = save(tmp_path / name, {**tree, **form})
    result = call(*forget(checkpoint, tmp_path / f"{name} out", "--json")).json
    assert result["copies"]["ema"]["params_sha256_before"] == params_sha256(average)
    assert result["params_sha256_before"] == params_sha256(tree["params"])
    where = tmp_path / f"{name} out" / "ema_params"
    after = params_sha256(restore_parts(where, stored_shapes(where)))
    assert after == result["copies"]["ema"]["params_sha256_after"] != params_sha256(average)


@pytest.mark.long
def test_a_checkpoint_of_a_run_gives_its_average_up(tmp_path):
  run = tmp_path / "run"
  call("train", "digits_paper", "--out", run, *TINY, "--train.ema", 0.9)
  of_run = call("forget", run, "--classes", 3, "--json").json
  of_plain = call(*forget(newest(run / "checkpoints"), tmp_path / "out", "--json")).json
  for plain, run in ((of_plain, of_run), (of_plain["copies"]["ema"], of_run["copies"]["ema"])):
    assert plain["params_sha256_after"] == run["params_sha256_after"]


def test_fields_of_the_config_can_be_overridden(tree, tmp_path):
  checkpoint = save(tmp_path / "plain", tree)
  result = call(*forget(checkpoint, tmp_path / "out", "--set", "lambda1=0.5", "--json")).json
  assert result["method"] == {"name": "perturbation", "lambda1": 0.5, "lambda2": 0.3}
  text = call(*forget(checkpoint, tmp_path / "again", "--set", "lambda1=0.5"))
  assert " 3 in " in text.out and "verdict  " in text.out and text.err == ""
  for field in ("train.epochs", "codes.rate", "forget.classes"):
    assert f"--{field}: a forget takes only" in call(
      *forget(checkpoint, tmp_path / "no", f"--{field}", 1)
    ).refusal(2)


def test_where_the_data_set_is_gone(tree, forgotten_once, tmp_path):
  checkpoint = save(tmp_path / "plain", tree)
  result = call(
    *forget(checkpoint, tmp_path / "out", "--unscored", "--data.name", "mnist", "--json")
  ).json
  expected = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  assert (
    result["params_sha256_after"] == expected["params_sha256_after"]
    and result["retain_accuracy_after"] is None
  )
  other = save(
    tmp_path / "no codes", {name: part for name, part in tree.items() if name != "codes"}
  )
  assert "holds no codes" in call(*forget(other, tmp_path / "no", "--unscored")).refusal()
  assert (
    "holds no codes"
    in call(*forget(save(tmp_path / "list", [np.ones(3)]), tmp_path / "no", "--unscored")).refusal()
  )


def test_a_step_of_a_checkpoint_manager(trained_once, forgotten_once, tmp_path):
  default = trained_once / "checkpoints" / "132" / "default"
  result = call(*forget(default, tmp_path / "out", "--json")).json
  expected = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  assert result["params_sha256_after"] == expected["params_sha256_after"]
  message = call(*forget(trained_once / "checkpoints" / "132", tmp_path / "no")).refusal()
  assert "no Orbax checkpoint" in message and "STEP/default" in message


def test_what_nobody_asks_for_is_not_read(tree, forgotten_once, tmp_path):
  """One folder an array; what those of the optimizer hold is damaged."""
  checkpoint = tmp_path / "plain"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    checkpointer.save(checkpoint, args=ocp.args.PyTreeSave(tree))
  chunks = [path for path in checkpoint.glob("optimizer.*/*") if path.name != ".zarray"]
  assert len(chunks) == 4
  for path in chunks:
    path.write_bytes(b"damaged")
  result = call(*forget(checkpoint, tmp_path / "out", "--json")).json
  expected = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  assert result["params_sha256_after"] == expected["params_sha256_after"]


@pytest.mark.long
def test_a_checkpoint_of_other_devices(tree, forgotten_once, tmp_path):
  """Written from eight devices, the kernels in parts; read by a process that has one."""
  mesh = cpu_mesh(8)
  params = place(tree["params"], mesh)
  params["hidden"] = place(params["hidden"], mesh, "data")
  checkpoint = save(tmp_path / "plain", {"params": params, "codes": place(tree["codes"], mesh)})
  outcome = command(*forget(checkpoint, tmp_path / "out", "--json"))
  expected = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  assert (
    outcome.json["params_sha256_after"] == expected["params_sha256_after"] and outcome.err == ""
  )


RESNET = ("--config", "digits_paper", "--model.name", "resnet10_small", "--model.width", 4)


@pytest.mark.long
def test_the_model_state_counts(tmp_path, monkeypatch):
  """Running statistics are restored; without them, or with others, it is not the same model."""
  monkeypatch.setitem(models._RESNETS, "resnet10_small", {"depths": (1,), "small_stem": True})
  digits = data.load("digits")
  model = models.make("resnet10_small", shape=digits.shape, num_classes=10, width=4)
  params, model_state = model.init(jax.random.key(0))
  model_state = jax.tree.map(lambda x: x + 0.5, model_state)
  codes = mj.make_codes(jax.random.key(1), 10, digits.shape, per_class=2)
  checkpoint = save(
    tmp_path / "plain", {"params": params, "model_state": model_state, "codes": codes}
  )
  arguments = ("forget", checkpoint, *RESNET, "--classes", 3, "--out")
  result = call(*arguments, tmp_path / "out", "--set", "lambda1=1e-3", "--json").json
  test = [(digits.preprocess(jnp.asarray(digits.test.images)), digits.test.labels)]
  scores = mj.evaluate(model.logits_fn(model_state), params, test, classes=[3])
  assert result["per_class_accuracy_before"] == pytest.approx(scores.per_class.tolist())
  shutil.rmtree(checkpoint)
  save(checkpoint, {"params": params, "codes": codes})
  message = call(*arguments, tmp_path / "no").refusal()
  assert (
    "has no model_state.stage1_block1.norm1.mean; "
    "resnet10_small of config 'digits_paper' for digits expects" in message
  )


def without(tree: dict, name: str) -> dict:
  return {key: value for key, value in tree.items() if key != name}


def with_kernel(tree: dict, kernel: np.ndarray) -> dict:
  hidden = {"kernel": kernel, "bias": tree["params"]["hidden"]["bias"]}
  return {**tree, "params": {**tree["params"], "hidden": hidden}}


BAD = {
  "no codes": (
    lambda t: without(t, "codes"),
    "holds note, optimizer, params, step; expected 'params' and 'codes'",
  ),
  "no params": (lambda t: without(t, "params"), "expected 'params' and 'codes'"),
  "a leaf less": (
    lambda t: {**t, "params": without(t["params"], "output")},
    "has no params.output.bias; mlp of config 'digits_paper' for digits expects float32 (10,)",
  ),
  "a leaf more": (
    lambda t: {**t, "params": {**t["params"], "third": {"bias": np.zeros(3, np.float32)}}},
    "holds params.third.bias, which mlp of config 'digits_paper' for digits has no place for",
  ),
  "a state that the model has not": (
    lambda t: {**t, "model_state": {"norm": {"mean": np.zeros(3, np.float32)}}},
    "holds model_state.norm.mean, which mlp",
  ),
  "another width": (
    lambda t: with_kernel(t, np.zeros((64, 16), np.float32)),
    "params.hidden.kernel is float32 (64, 16) there; "
    "mlp of config 'digits_paper' for digits expects float32 (64, 32)",
  ),
  "another dtype": (
    lambda t: with_kernel(t, jnp.zeros((64, 32), jnp.bfloat16)),
    "params.hidden.kernel is bfloat16 (64, 32) there; "
    "mlp of config 'digits_paper' for digits expects float32 (64, 32)",
  ),
  "not a number": (
    lambda t: with_kernel(t, np.full((64, 32), np.nan, np.float32)),
    "NaN or inf in ['hidden']['kernel']",
  ),
  "codes of other classes": (
    lambda t: {**t, "codes": t["codes"][:9]},
    "codes is float32 (9, 1, 8, 8, 1) there; expected floats (10, K, 8, 8, 1)",
  ),
  "codes of another shape": (
    lambda t: {**t, "codes": t["codes"][:, :, :7]},
    "(10, 1, 7, 8, 1) there",
  ),
  "codes without K": (lambda t: {**t, "codes": t["codes"][:, 0]}, "(10, 8, 8, 1) there"),
  "a copy of the params by another name": (
    lambda t: {**t, "ema": jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), t["params"])},
    "holds ema, of the shapes of params. If it may be served, it must forget too: "
    "save it as ema_params, in the dtype",
  ),
  "two averages": (
    lambda t: {**t, "ema_params": t["params"], "optimizer_state": {"average": t["params"]}},
    "holds optimizer_state.average, of the shapes of params",
  ),
  "integer codes": (lambda t: {**t, "codes": t["codes"].astype(np.int32)}, "codes is int32"),
  "a tree of codes": (
    lambda t: {**t, "codes": {"all": t["codes"]}},
    "codes is dict there; expected floats",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_does_not_fit(case, tree, tmp_path):
  change, message = BAD[case]
  checkpoint = save(tmp_path / "plain", change(tree))
  assert message in call(*forget(checkpoint, tmp_path / "out")).refusal()
  assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_is_no_checkpoint_or_a_damaged_one(tree, tmp_path):
  (tmp_path / "empty").mkdir()
  for name in ("empty", "nothing"):
    assert (
      f"{name}: is no Orbax checkpoint"
      in call(*forget(tmp_path / name, tmp_path / "out")).refusal()
    )
  checkpoint = save(tmp_path / "plain", tree)
  metadata = (checkpoint / "_METADATA").read_bytes()
  (checkpoint / "_METADATA").write_text("{")
  assert "plain: cannot be restored: " in call(*forget(checkpoint, tmp_path / "out")).refusal()
  (checkpoint / "_METADATA").write_bytes(metadata)
  for file in checkpoint.rglob("d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  assert "plain: cannot be restored: " in call(*forget(checkpoint, tmp_path / "out")).refusal()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "plain"]


def test_out_must_be_new_and_outside(tree, tmp_path):
  checkpoint = save(tmp_path / "plain", tree)
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "text").write_text("mine")
  before = snapshot(tmp_path)
  for out in (tmp_path / "thesis", tmp_path / "thesis" / "text", checkpoint):
    assert "is there already, and not empty" in call(*forget(checkpoint, out)).refusal()
  assert "lies inside the checkpoint" in call(*forget(checkpoint, checkpoint / "out")).refusal()
  assert (
    "text/out: cannot be written"
    in call(*forget(checkpoint, tmp_path / "thesis" / "text" / "out")).refusal()
  )
  assert snapshot(tmp_path) == before
  (tmp_path / "empty").mkdir()
  assert call(*forget(checkpoint, tmp_path / "empty")).code == 0


def test_the_disk_is_full(tree, disk, tmp_path):
  checkpoint = save(tmp_path / "plain", tree)
  filler = disk.leave(40)
  assert "No space left on device" in call(*forget(checkpoint, disk.path / "out")).refusal()
  assert [path.name for path in disk.path.iterdir()] == ["filler"]
  filler.unlink()
  assert call(*forget(checkpoint, disk.path / "out")).code == 0


def test_runs_and_checkpoints_are_told_apart(tree, trained, tmp_path):
  checkpoint = save(tmp_path / "plain", tree)
  three = ("--classes", 3)
  assert "--config: missing" in call("forget", checkpoint, *three).refusal(2)
  assert "--config: missing" in call(
    "forget", checkpoint, *three, "--out", tmp_path / "out"
  ).refusal(2)
  assert "--out: missing" in call("forget", checkpoint, *three, *CONFIG).refusal(2)
  assert "is a run, which has its own config" in call(
    "forget", trained, *three, "--config", "digits_paper"
  ).refusal(2)
  assert "a run keeps its forgets in" in call(
    "forget", trained, *three, "--out", tmp_path / "out"
  ).refusal(2)
  assert "no such run folder" in call("forget", tmp_path / "nothing", *three).refusal()
  assert "Did you mean digits?" in call(
    *forget(checkpoint, tmp_path / "out", "--config", "digit")
  ).refusal(2)
  assert "got 12; expected an index from 0 to 9" in call(
    *forget(checkpoint, tmp_path / "out", "--classes", 12)
  ).refusal(2)
  everything = call(*forget(checkpoint, tmp_path / "out", "--classes", *range(10))).refusal(2)
  assert "are all 10; one must stay" in everything and "before" not in everything
  assert not (trained / "forgets").exists() and not (tmp_path / "out").exists()
