"""Learned codes on the command line: `mnemonic codes`, and what `run` and `forget` make of them."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import call, snapshot
from safetensors.numpy import load_file, save_file

from mnemonic_jax.runs import stepwise
from mnemonic_jax.runs.checkpoints import newest, restore_parts, stored_shapes

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SMALL = ("--train.epochs", 8, "--model.hidden", 128, "--train.learning_rate", 0.1)
NO_METHOD = ("--forget.method", "")


@pytest.fixture
def run(learned_once, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(learned_once[0], tmp_path / "run"))


def test_a_run_without_codes_learns_them_and_forgets_by_the_default(learned_once):
  folder, result = learned_once
  codes, forget = result["codes"], result["forget"]
  assert codes["read"] == ["params", "training examples"]
  assert (codes["classes"], codes["per_class"], codes["recalled"]) == (10, 1, 0)
  assert codes["judges"] >= 10
  assert forget["method"]["name"] == "projection" and forget["method"]["drop_row"] is True
  assert forget["forget_error_after"] == 1 and forget["verdict"] == "forgotten"
  assert forget["retain_accuracy_after"] >= forget["retain_accuracy_before"] - 0.02
  assert forget["codes_sha256"] == codes["codes_sha256"]
  assert forget["read"] == {"forget": ["params", "codes"], "score": "test"}
  assert set(forget["predicted"]) == {"retain_accuracy", "forget_error"}
  page = (folder / "forgets" / "0001" / "report.html").read_text()
  assert "Predicted by judges" in page and "depth = " in page


def test_a_later_request_by_another_method_joins_it(run, learned_once):
  result = call(
    "forget", run, "--classes", 5, "--method", "projection", "--set", "depth=1", "--json"
  ).json
  assert result["classes"] == [0, 5] and result["method"]["depth"] == 1
  assert result["per_class_accuracy_after"][0] == result["per_class_accuracy_after"][5] == 0
  again = call("forget", run, "--classes", 5, "--method", "drop_row", "--json").json
  assert again["method"] == {"name": "drop_row"} and again["forget_error_after"] == 1
  assert (run / "forgets" / "0003").is_dir()


def test_the_page_is_written_again_with_the_learned_codes(run):
  page = run / "forgets" / "0001" / "report.html"
  before = page.read_text()
  assert call("report", run).code == 0 and page.read_text() == before


def test_the_page_is_refused_with_codes_that_the_forget_did_not_use(run):
  (run / "codes" / "learned.safetensors").rename(run / "elsewhere")
  message = call("report", run).refusal()
  assert "holds other codes than this forget used" in message and "--hide-codes" in message
  assert call("report", run, "--hide-codes").code == 0


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--train.epochs", 9), "--train.epochs: codes are learned with fields of no section alone"),
    (("--recall", "--beside", 2), "--beside: is for learned codes"),
    (("--config", "digits", "--out", "x.safetensors"), "is a run, which has its own config"),
    (("--out", "x.npz"), "expected a name that ends in .safetensors"),
  ],
)
def test_codes_refuses_what_it_would_not_look_at(words, message, learned_once):
  before = snapshot(learned_once[0])
  assert message in call("codes", learned_once[0], *words).refusal(2)
  assert snapshot(learned_once[0]) == before


def test_learned_codes_are_not_overwritten(run):
  before = snapshot(run)
  message = call("codes", run).refusal()
  assert "is there already. Nothing was changed" in message and snapshot(run) == before


def test_codes_are_recalled_without_a_picture_and_the_same_seed_gives_the_same(run):
  path = run / "codes" / "learned.safetensors"
  learned = load_file(path)
  path.unlink()
  found = call("codes", run, "--recall", "--per-class", 2, "--json").json
  assert found["read"] == ["params"] and found["per_class"] == 2 and found["judges"] == 0
  recalled = load_file(path)
  assert recalled["codes"].shape == (10, 2, 8, 8, 1) and recalled["judges"].shape[1] == 0
  result = call("forget", run, "--classes", 5, "--json").json
  assert result["predicted"] is None and result["forget_error_after"] == 1
  path.unlink()
  assert call("codes", run, "--json").json["codes_sha256"]
  assert all(np.array_equal(learned[name], again) for name, again in load_file(path).items())


def test_a_run_without_codes_says_how_to_learn_them(run):
  shutil.rmtree(run / "codes")
  message = call("forget", run, "--classes", 5).refusal()
  assert "codes.rate: got 0" in message and "mnemonic codes RUN" in message


@pytest.mark.parametrize("damage", ["another model", "cut", "another shape", "not ours"])
def test_codes_that_are_not_this_model_s_are_refused(damage, run):
  path = run / "codes" / "learned.safetensors"
  arrays = load_file(path)
  if damage == "another model":
    save_file(arrays, path, {"params_sha256": "0" * 64})
  elif damage == "cut":
    path.write_bytes(path.read_bytes()[:100])
  elif damage == "another shape":
    save_file({**arrays, "codes": arrays["codes"][:9]}, path)
  else:
    save_file({"codes": arrays["codes"]}, path)
  expected = {
    "another model": "was learned from other params",
    "cut": "cannot be read as learned codes",
    "another shape": "expected (10, K, 8, 8, 1)",
    "not ours": "has no judge_accuracy",
  }[damage]
  before = snapshot(run)
  assert expected in call("forget", run, "--classes", 5).refusal()
  assert snapshot(run) == before


@pytest.mark.filterwarnings("ignore:The model classifies")
def test_a_search_that_finds_nothing_prints_its_curve_and_writes_nothing(run):
  path = run / "codes" / "learned.safetensors"
  arrays, report = load_file(path), json.loads((run / "forgets/0001/report.json").read_text())
  hopeless = {**arrays, "codes": arrays["codes"][::-1].copy()}
  save_file(hopeless, path, {"params_sha256": report["params_sha256_before"]})
  before = snapshot(run)
  outcome = call("forget", run, "--classes", 5, "--method", "dampening", "--json")
  assert outcome.code == 1 and snapshot(run) == before
  assert outcome.out, outcome.err
  told = json.loads(outcome.out)
  assert len(told["curve"]) == 11 and "none of 11 candidates" in told["error"]


def test_a_plain_checkpoint_without_codes(run, tmp_path):
  """Params alone: learn the codes, then forget."""
  checkpoint = newest(run / "checkpoints")
  params = restore_parts(checkpoint, {"params": stored_shapes(checkpoint)["params"]})["params"]
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "plain", {"params": jax.tree.map(np.asarray, params)})
  plain, config = tmp_path / "plain", ("--config", "digits_paper", "--model.hidden", 128)
  file, out = tmp_path / "codes.safetensors", tmp_path / "out"
  asked = ("forget", plain, *config, "--classes", 3, "--out", out)
  assert "mnemonic codes" in call(*asked).refusal()
  assert call("codes", plain, *config, "--out", file, "--json").json["judges"] >= 10
  result = call(*asked, "--codes", file, *NO_METHOD, "--json").json
  assert result["method"]["name"] == "projection" and result["forget_error_after"] == 1
  theirs = load_file(run / "codes" / "learned.safetensors")
  assert np.array_equal(load_file(file)["codes"], theirs["codes"])


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (("--method", "projection", "--set", "depth=9"), 1, "depth: got 9; this model has 1 site"),
    (("--method", "projection", "--set", "depth=-1"), 2, "depth: got -1"),
    (("--method", "projection", "--set", "sites=hidden"), 2, "expected a number, true, false"),
    (("--method", "projection", "--set", 'sites=["hiden"]'), 1, "Did you mean hidden.kernel"),
    (("--method", "dampening", "--set", "quantile=1.5"), 2, "quantile: got 1.5"),
    (("--method", "dampening", "--set", "quantil=0.5"), 2, "Did you mean quantile"),
    (("--codes", "x.safetensors"), 2, "--codes: is for a plain checkpoint"),
  ],
)
def test_wrong_settings_are_told_and_change_nothing(words, code, message, learned_once):
  before = snapshot(learned_once[0])
  assert message in call("forget", learned_once[0], "--classes", 5, *words).refusal(code)
  assert snapshot(learned_once[0]) == before


# Healing, and stages learned anew ----------------------------------------------------------------

HEALED = ("--heal", 6, "--set", "depth=1")


def recalled(run: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (run / "codes").iterdir())


def test_forget_heals_on_codes_that_it_recalls_itself_and_keeps(run):
  result = call("forget", run, "--classes", 5, *HEALED, "--json").json
  settings = {"depth": 1, "sites": [], "drop_row": True, "heal": 6}
  assert result["method"] == {"name": "projection", **settings}
  assert recalled(run) == ["learned.safetensors", "recalled_8.safetensors"]
  before = snapshot(run / "codes")
  again = call("forget", run, "--classes", 5, *HEALED, "--json").json
  assert snapshot(run / "codes") == before
  assert again["params_sha256_after"] == result["params_sha256_after"]
  assert not list((run / "forgets").glob(".stepwise*"))
  assert result["read"]["forget"] == ["params", "codes"]


def test_deep_learns_the_last_stage_anew(run):
  words = ("--deep", 2, "--set", "steps=5", "--set", "rate=0.01")
  result = call("forget", run, "--classes", 5, *words, "--json").json
  method = {"name": "relearn", "depth": 2, "steps": 5, "rate": 0.01}
  assert result["method"] == method and result["info"]["training_mode"] is False
  assert result["forget_error_after"] == 1
  assert recalled(run) == ["learned.safetensors", "recalled_64.safetensors"]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--deep", 9), "depth: got 9; this model has 2 arrays"),
    (("--heal", 6, "--set", "depth=9"), "depth: got 9; this model has 1 sites"),
    (("--heal", 6, "--set", 'sites=["hiden"]'), "Did you mean hidden.kernel"),
  ],
)
def test_what_the_model_cannot_do_is_told_before_codes_are_recalled(words, message, run):
  before = recalled(run)
  assert message in call("forget", run, "--classes", 5, *words).refusal()
  assert recalled(run) == before


class Stop(BaseException):
  """Stands for a kill."""


def test_a_stopped_forget_goes_on_where_it_was(run, monkeypatch):
  whole = call("forget", run, "--classes", 5, *HEALED, "--json").json
  monkeypatch.setattr(stepwise, "SECONDS_BETWEEN", 0.0)
  show, seen = stepwise.Kept.progress, []

  def stop(self, done, of):
    seen.append(done)
    if done == 4 and len(seen) == 4:
      raise Stop
    show(self, done, of)

  monkeypatch.setattr(stepwise.Kept, "progress", stop)
  with pytest.raises(Stop):
    call("forget", run, "--classes", 5, *HEALED, "--json")
  assert len(list((run / "forgets").glob(".stepwise*"))) == 1
  result = call("forget", run, "--classes", 5, *HEALED, "--json").json
  assert seen == [1, 2, 3, 4, 5, 6]
  assert result["params_sha256_after"] == whole["params_sha256_after"]
  assert not list((run / "forgets").glob(".stepwise*"))


def test_a_damaged_state_is_begun_again(run, monkeypatch):
  monkeypatch.setattr(stepwise.Kept, "load", _damaged(stepwise.Kept.load))
  assert call("forget", run, "--classes", 5, *HEALED, "--json").json["method"]["heal"] == 6


def _damaged(load):
  def damaged(self):
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.write_bytes(b"no safetensors")
    return load(self)

  return damaged


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--heal", "--deep"), "--heal: got --deep too"),
    (("--heal", "--method", "dampening"), "--heal: is for the method projection"),
    (("--deep", "--method", "projection"), "--deep: is for the method relearn"),
    (("--method", "relearn"), "forget.settings.depth: missing"),
    (("--deep", "--set", "fresh=1"), "forget.settings.fresh: unknown setting of relearn"),
    (("--heal", "--set", "heal=-1"), "heal: got -1"),
    (("--deep", "--set", "rate=x"), "forget.settings.rate: got 'x'; expected a number"),
  ],
)
def test_bad_words_for_healing(learned_once, words, message):
  folder, _ = learned_once
  before = snapshot(folder)
  assert message in call("forget", folder, "--classes", 5, *words).refusal(2)
  assert snapshot(folder) == before
