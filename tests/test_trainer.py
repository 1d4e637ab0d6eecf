"""The trainer on one device and on eight, by epochs and by steps: the same losses."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from running import TINY, call

from mnemonic_jax import data
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import UsageError
from mnemonic_jax.multihost.sharding import Layout, make_mesh
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import scoring, setup
from mnemonic_jax.runs.train import StoredFeed

pytest_plugins = ["run_fixtures", "stream_fixtures"]


def lines(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(out, *words):
  return call("train", "digits_paper", "--out", out, *TINY, *words, "--json").json


def test_eight_devices_train_as_one_and_one_goes_on(tmp_path):
  results = {}
  for name, words in (("one", ()), ("mesh", ("--execution.data", 2, "--execution.fsdp", 4))):
    results[name] = train(tmp_path / name, "--log-every", 20, *words)
  assert results["one"]["mesh"] is None and results["mesh"]["mesh"] == {"data": 2, "fsdp": 4}
  ours, theirs = lines(tmp_path / "mesh"), lines(tmp_path / "one")
  steps = [20, 40, 44, 60, 80, 88, 100, 120, 132]
  assert [line["step"] for line in ours] == [line["step"] for line in theirs] == steps
  for key in ("loss", "accuracy"):
    np.testing.assert_allclose(*([x[key] for x in found] for found in (ours, theirs)), rtol=1e-4)
  assert results["mesh"]["codes_sha256"] == results["one"]["codes_sha256"]
  # the checkpoint of the mesh, taken up by one device
  shutil.rmtree(tmp_path / "mesh" / "checkpoints" / "132")
  resumed = train(tmp_path / "mesh", "--log-every", 20)
  assert (resumed["resumed_from_step"], resumed["mesh"]) == (88, None)
  assert lines(tmp_path / "mesh")[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-4)
  found = call("evaluate", tmp_path / "mesh", "--json").json
  assert found["trained"]["accuracy"] == resumed["test_accuracy"]


def test_an_epoch_in_one_call_is_its_steps_one_by_one(trained_once, tmp_path):
  """Up to rounding: of two programs, one gathers its rows itself."""
  by_steps = train(tmp_path / "run", "--log-every", 22)
  whole = lines(trained_once)
  halves = np.array([line["loss"] for line in lines(tmp_path / "run")]).reshape(3, 2)
  np.testing.assert_allclose(halves.mean(1), [line["loss"] for line in whole], rtol=1e-5)
  assert by_steps["codes_sha256"] == train(trained_once)["codes_sha256"]


def test_a_profile_is_written_beside_the_run(tmp_path):
  train(tmp_path / "run", "--profile")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_loss_that_is_not_finite_ends_a_training(tmp_path):
  words = ("train", "digits_paper", "--out", tmp_path / "run", *TINY, "--train.learning_rate", 1e30)
  assert "is nan; expected a finite one" in call(*words).refusal()
  assert "is nan; expected a finite one" in call(*words, "--execution.fsdp", 8).refusal()


@pytest.mark.parametrize("flag", ["-1", "x", "1.5"])
def test_a_count_of_steps_that_is_none(flag, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    from mnemonic_jax.cli import main

    main(["train", "digits_paper", "--out", str(tmp_path), f"--log-every={flag}"])
  assert ended.value.code == 2 and "expected an integer of at least 0" in capsys.readouterr().err


def layout_of(dataset, **sizes):
  tables = {f"execution.{name}": size for name, size in sizes.items()}
  return setup.make_layout(configs.load("digits", tables), dataset).mesh


def test_which_devices_a_training_takes(prepared_sets):
  stored = data.load("digits")
  streamed = data.load("cars196", str(prepared_sets), side=16)
  assert layout_of(stored) is None and layout_of(streamed, data=1, fsdp=1) is None
  assert dict(layout_of(streamed).shape) == {"data": 1, "fsdp": 8}
  assert dict(layout_of(stored, data=2).shape) == {"data": 2, "fsdp": 4}
  with pytest.raises(UsageError, match=r"execution\.data, execution\.fsdp: mesh: got data 3"):
    layout_of(stored, data=3)


def test_the_processes_of_a_run_share_each_batch_of_a_stored_set_in_order():
  split = Split(np.arange(22, dtype=np.uint8)[:, None], np.arange(22, dtype=np.int32) % 3)
  feed = lambda first, process=(0, 1): list(
    StoredFeed(split, jax.random.key(3), 4, process)(first, 12)
  )
  whole = feed(0)
  rows = np.concatenate([batch.rows for batch in whole[:5]])
  assert len(set(rows.tolist())) == 20
  for batch in whole:
    np.testing.assert_array_equal(batch.images[:, 0], batch.rows)
    np.testing.assert_array_equal(batch.labels, batch.rows % 3)
  together = [
    np.concatenate([one.rows, other.rows])
    for one, other in zip(feed(0, (0, 2)), feed(0, (1, 2)), strict=True)
  ]
  np.testing.assert_array_equal(together, [batch.rows for batch in whole])
  np.testing.assert_array_equal([b.rows for b in feed(7)], [b.rows for b in whole[7:]])
  assert not np.array_equal(whole[0].rows, whole[5].rows)  # another epoch, another order


@pytest.mark.parametrize("count", [1, 7, 130])
def test_predictions_on_a_mesh_are_those_of_one_device(count):
  """Of numbers of pictures that eight devices do not divide."""
  dataset = data.load("digits")
  split = dataset.test.part(np.arange(count))
  model = setup.make_model(configs.load("digits"), dataset)
  params, _ = model.init(jax.random.key(0))
  candidates = [params, jax.tree.map(lambda x: -x, params)]
  found = [
    scoring.predict_each(model.logits_fn({}), candidates, split, dataset.preprocess, layout)
    for layout in (Layout(), Layout(make_mesh(2, 4)))
  ]
  for one, mesh in zip(*found, strict=True):
    assert len(one.labels) == count
    np.testing.assert_array_equal(mesh.labels, split.labels)
    np.testing.assert_array_equal(mesh.predictions, one.predictions)
    np.testing.assert_allclose(mesh.losses, one.losses, rtol=1e-5)
