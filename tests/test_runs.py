"""The run folder: determinism, resuming, what a forget writes and what it leaves alone."""

from __future__ import annotations

import hashlib
import html
import json
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import FORGET_KEYS, TINY, call, snapshot
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mnemonic_jax import data, forgetting, models
from mnemonic_jax import report as reports
from mnemonic_jax.errors import Interrupted, MnemonicError
from mnemonic_jax.progress import Progress
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, finished, scoring, signals
from mnemonic_jax.runs import forget as forget_run
from mnemonic_jax.runs import train as train_run
from mnemonic_jax.runs import trained as trained_run
from mnemonic_jax.runs.checkpoints import restore_codes
from mnemonic_jax.runs.folder import RunFolder

pytest_plugins = ["run_fixtures"]


def sha256_of_params(tree: dict) -> str:
  """The hash as the design page defines it, written again: dicts of arrays only."""
  leaves: dict[str, np.ndarray] = {}

  def walk(node: object, path: str) -> None:
    if isinstance(node, dict):
      for name, child in node.items():
        walk(child, f"{path}['{name}']")
    else:
      leaves[path] = np.asarray(node)

  walk(tree, "")
  text = b""
  for path in sorted(leaves):
    array = leaves[path]
    text += b"".join(
      part.encode() + b"\0" for part in (path, str(array.dtype), str(tuple(array.shape)))
    )
    text += array.astype(array.dtype.newbyteorder("<")).tobytes(order="C")
  return hashlib.sha256(text).hexdigest()


def restored(folder: pathlib.Path) -> dict:
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder.absolute())


def test_the_same_seed_gives_the_same_params_and_another_seed_others(trained_once, tmp_path):
  first = call(
    "train", "digits_paper", "--out", trained_once, *TINY, "--json"
  ).json  # finished: changes nothing
  again = call("train", "digits_paper", "--out", tmp_path / "again", *TINY, "--json").json
  other = call(
    "train", "digits_paper", "--out", tmp_path / "other", *TINY, "--train.seed", 1, "--json"
  ).json
  assert first["params_sha256"] == again["params_sha256"] != other["params_sha256"]
  assert first["codes_sha256"] == again["codes_sha256"] != other["codes_sha256"]
  assert first["resumed_from_epoch"] == 3


def test_a_training_that_was_stopped_resumes_bit_for_bit(trained_once, tmp_path):
  run = pathlib.Path(shutil.copytree(trained_once, tmp_path / "run"))
  whole = call("train", "digits_paper", "--out", trained_once, *TINY, "--json").json
  for step in ("88", "132"):
    shutil.rmtree(run / "checkpoints" / step, ignore_errors=True)
  shutil.copytree(trained_once / "checkpoints" / "88", run / "checkpoints" / "88")
  resumed = call("train", "digits_paper", "--out", run, *TINY, "--json").json
  assert resumed["resumed_from_epoch"] == 2
  assert resumed["params_sha256"] == whole["params_sha256"]
  assert resumed["loss"] == whole["loss"]
  epochs = [record["epoch"] for record in RunFolder.open(run).metrics()]
  assert epochs == [1, 2, 3]


def test_two_checkpoints_are_kept(trained_once):
  assert sorted(path.name for path in (trained_once / "checkpoints").iterdir()) == ["132", "88"]


def test_a_forget_writes_beside_and_never_over(trained):
  before, ledger = snapshot(trained), (trained / "ledger.jsonl").read_text()
  result = call("forget", trained, "--classes", 3, 5, "--json").json
  after = snapshot(trained)
  changed = {name for name in before if after[name] != before[name]}
  assert changed == {"ledger.jsonl"}
  assert (trained / "ledger.jsonl").read_text().startswith(ledger)
  assert {name.split("/")[0] for name in set(after) - set(before)} == {"forgets"}
  assert not list((trained / "forgets").glob(".*"))
  folder = trained / "forgets" / "0001"
  assert sorted(path.name for path in folder.iterdir()) == [
    "evidence.json",
    "params",
    "report.html",
    "report.json",
  ]
  assert folder.stat().st_mode & 0o777 == 0o755

  report = json.loads((folder / "report.json").read_text())
  evidence = json.loads((folder / "evidence.json").read_text())
  reports.validate(report, evidence)
  assert report.keys() >= FORGET_KEYS
  assert report == {key: value for key, value in result.items() if key not in ("folder", "report")}
  assert (report["requested"], report["classes"]) == ([3, 5], [3, 5])
  assert report["seconds"].keys() >= {"compile", "total"}


def test_hashes_are_those_of_the_files(forgotten_once):
  report = json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())
  after = restored(forgotten_once / "forgets" / "0001" / "params")
  assert sha256_of_params(after) == report["params_sha256_after"]
  checkpoint = restored(forgotten_once / "checkpoints" / "132" / "default")
  assert sha256_of_params(checkpoint["params"]) == report["params_sha256_before"]
  assert report["params_sha256_before"] != report["params_sha256_after"]
  codes = np.asarray(checkpoint["codes"])
  assert hashlib.sha256(codes.astype("<f4").tobytes()).hexdigest() == report["codes_sha256"]
  assert np.array_equal(restore_codes(forgotten_once / "checkpoints"), codes)


def test_a_forget_minds_the_layer_axis_of_the_model(trained, monkeypatch):
  """As of a scanned ViT; here the MLP calls the units of its hidden layer layers."""
  layer_axis = {"hidden": {"kernel": 1, "bias": None}, "output": None}
  seen = []

  def restore(*arguments: object) -> object:
    seen.append(forget_run_restore(*arguments))
    return seen[0]._replace(model=seen[0].model._replace(layer_axis=layer_axis))

  forget_run_restore = forget_run.restore
  monkeypatch.setattr(forget_run, "restore", restore)
  assert call("forget", trained, "--classes", 3).code == 0
  after = restored(trained / "forgets" / "0001" / "params")
  checkpoint = jax.tree.map(
    jax.numpy.asarray, restored(trained / "checkpoints" / "132" / "default")
  )
  method = configs.make_method(RunFolder.open(trained).config.forget)

  def distance(axis: object) -> float:
    arguments = seen[0].logits_fn, checkpoint["params"], checkpoint["codes"], [3]
    wanted = forgetting.forget(*arguments, method=method, layer_axis=axis).params
    return float(np.abs(after["hidden"]["kernel"] - wanted["hidden"]["kernel"]).max())

  assert distance(layer_axis) < 1e-5 < 1e-3 < distance(None)


def test_a_forget_covers_the_average_of_the_params_too(trained_once, tmp_path):
  plain, run = (
    pathlib.Path(shutil.copytree(trained_once, tmp_path / "plain")),
    tmp_path / "averaged",
  )
  averaged = call("train", "digits_paper", "--out", run, *TINY, "--train.ema", 0.9, "--json").json
  report = call("forget", run, "--classes", 3, "--json").json
  alone = call("forget", plain, "--classes", 3, "--json").json
  assert "copies" not in alone and not (plain / "forgets" / "0001" / "ema_params").exists()
  assert set(report["copies"]) == {"ema"} and alone.keys() == report.keys() - {"copies"}
  copies, folder = {"params": report, "ema": report["copies"]["ema"]}, run / "forgets" / "0001"
  assert averaged["params_sha256"] == report["params_sha256_before"]
  for when in ("before", "after"):
    assert report[f"params_sha256_{when}"] == alone[f"params_sha256_{when}"]
  assert report["verdict"] == "not forgotten"  # three epochs are too few

  checkpoint = restored(run / "checkpoints" / "132" / "default")
  average = checkpoint["optimizer_state"]["average"]
  for name, before, after in (
    ("params", checkpoint["params"], "params"),
    ("ema", average, "ema_params"),
  ):
    assert copies[name]["params_sha256_before"] == sha256_of_params(before)
    assert copies[name]["params_sha256_after"] == sha256_of_params(restored(folder / after))
    assert copies[name]["forget_error_after"] > copies[name]["forget_error_before"] + 0.2
    assert copies[name]["info"]["sign"] in (1, -1) and copies[name]["seconds"]["total"] > 0
    assert copies[name]["verdicts"].keys() == {"3"}
  assert (
    len({copies[name][f"params_sha256_{when}"] for name in copies for when in ("before", "after")})
    == 4
  )
  reports.validate(
    *(json.loads((folder / f"{name}.json").read_text()) for name in ("report", "evidence"))
  )
  # what else shows scores shows those of both copies
  evaluated, shown = call("evaluate", run, "--json").json, call("evaluate", run).out
  told = call("forget", plain, "--classes", 4).out + call("evaluate", plain).out
  page = html.unescape((folder / "report.html").read_text()).replace("\u00a0", " ")
  for name, suffix in (("params", ""), ("ema", "_ema")):
    for key in ("retain_accuracy", "forget_error", "per_class_accuracy"):
      for model, when in (("trained", "before"), ("forgotten", "after")):
        assert evaluated[model + suffix][key] == copies[name][f"{key}_{when}"]
        assert key == "per_class_accuracy" or f"{evaluated[model + suffix][key]:.2%}" in shown
        assert copies[name][f"params_sha256_{when}"] in page
  assert evaluated["forgotten_ema"]["params"] == str(folder / "ema_params")
  assert shown.count("its average") == 2 and "Moving average, after" in page
  assert (
    "average" not in told
    and "Moving average" not in (plain / "forgets" / "0001" / "report.html").read_text()
  )
  assert call("evaluate", plain, "--json").json.keys() == {"run", "classes", "trained", "forgotten"}
  again = call("forget", run, "--classes", 4).out
  assert (
    "accuracy, kept classes (average)" in again and "error, forgotten classes (average)" in again
  )
  exported = call(
    "export", run, "--out", tmp_path / "ema.safetensors", "--ema", "--number", 1, "--json"
  ).json
  assert exported["params_sha256"] == copies["ema"]["params_sha256_after"]
  message = call("export", plain, "--out", tmp_path / "no.safetensors", "--ema").refusal(2)
  assert "--ema: " in message and "has no moving average" in message
  # by its own Fishers, at its own values: what the core makes of the average alone
  model = models.make("mlp", shape=(8, 8, 1), num_classes=10, hidden=32)
  method = configs.make_method(configs.load("digits_paper").forget)
  codes = jax.numpy.asarray(checkpoint["codes"])
  wanted = forgetting.forget(
    model.logits_fn({}), jax.tree.map(jax.numpy.asarray, average), codes, [3], method=method
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    restored(folder / "ema_params"),
    wanted.params,
  )
  # an average that is not the report's
  latest = run / "forgets" / "0002"
  shutil.rmtree(latest / "ema_params")
  shutil.copytree(latest / "params", latest / "ema_params")
  assert "0002/ema_params: is not what report.json says" in call("evaluate", run).refusal()


def as_format_1(run: pathlib.Path) -> None:
  """Rewrite config.json and report.json as the first format had them."""
  record = json.loads((run / "config.json").read_text())
  forget = record["config"]["forget"]
  settings = forget.pop("settings")
  assert forget.pop("method") == "perturbation"
  record["format"], record["config"]["forget"] = 1, {**forget, **settings}
  (run / "config.json").write_text(json.dumps(record))
  file = run / "forgets" / "0001" / "report.json"
  report = json.loads(file.read_text())
  new = ("class_names", "time", "read", "verdict", "verdicts", "method", "info")
  old = {key: value for key, value in report.items() if key not in new}
  sign, of_old = report["info"]["sign"], {"params": "Not forgotten"}
  old |= {"sign": sign, "lambda1": 3e-3, "lambda2": 0.3, "verdicts": of_old}
  if "copies" in report:
    average = {k: v for k, v in report["copies"]["ema"].items() if k not in new}
    old["copies"] = {"params": {"sign": sign}, "ema": {**average, "sign": sign}}
  file.write_text(json.dumps(old))


def test_a_run_of_format_1_goes_on(forgotten, tmp_path):
  folder = forgotten / "forgets" / "0001"
  report = json.loads((folder / "report.json").read_text())
  as_format_1(forgotten)
  before = snapshot(forgotten)
  read, _ = finished.read(folder)
  assert read == report | {"time": None}
  result = call("train", "digits_paper", "--out", forgotten, *TINY, "--json").json
  assert result["resumed_from_epoch"] == 3
  assert call("evaluate", forgotten, "--json").json["classes"] == [3]
  exported = call("export", forgotten, "--out", tmp_path / "old.safetensors", "--json").json
  assert exported["params_sha256"] == report["params_sha256_after"]
  assert snapshot(forgotten) == before
  assert call("report", forgotten).code == 0
  assert "not recorded" in (folder / "report.html").read_text()
  again = call("forget", forgotten, "--classes", 5, "--json").json
  assert (again["classes"], again["method"]) == ([3, 5], report["method"])


def test_a_report_of_format_1_with_an_average(forgotten):
  file = forgotten / "forgets" / "0001" / "report.json"
  report = json.loads(file.read_text())
  average = {key: report[key] for key in reports.schema.COPY}
  file.write_text(json.dumps(report | {"copies": {"ema": average}}))
  as_format_1(forgotten)
  read, _ = finished.read(file.parent)
  assert read == report | {"copies": {"ema": average}, "time": None}
  old = json.loads(file.read_text())
  file.write_text(json.dumps({key: old[key] for key in old if key != "lambda2"}))
  with pytest.raises(MnemonicError, match=r"report\.json: was edited, or half-written"):
    finished.read(file.parent)


def test_a_copy_that_still_knows_a_class_makes_the_verdict(trained_once):
  """With a method that edits the head of the params, and forgets nothing in their average."""
  run, dataset = RunFolder.open(trained_once), data.load("digits")
  trained = trained_run.restore(run, dataset)
  trained = trained._replace(ema_params=jax.tree.map(jnp.copy, trained.params))

  def one_shot(params: dict) -> forgetting.ForgetResult:
    after = head_edit(params, trained.model.head, [3]) if params is trained.params else params
    method = configs.make_method(run.config.forget)
    seconds = {"compile": 0.0, "total": 0.0}
    return forgetting.ForgetResult(after, method, 1.0, 1.0, {"cuts": np.arange(2)}, seconds)

  asked = forget_run.check_request(run.config, ["3"], dataset.class_names)
  report, _ = forget_run.described(trained, run.config, dataset, asked, one_shot)
  average = report["copies"]["ema"]
  assert report["verdicts"]["3"] == {"verdict": "forgotten", "evidence": "test", "error": 1.0}
  assert average["verdicts"]["3"]["verdict"] == report["verdict"] == "not forgotten"
  assert files.plain(report)["info"] == files.plain(average)["info"] == {"cuts": [0, 1]}


def test_the_newest_checkpoints_stay(tmp_path):
  def kept(folder: str, epochs: int, *words: object) -> list[int]:
    fixed = ("--train.checkpoint_every", 1, "--model.hidden", 32, "--train.epochs", epochs)
    result = call(
      "train", "digits_paper", "--out", tmp_path / folder, *fixed, *words, "--json"
    ).json
    found = sorted(int(path.name) // 44 for path in (tmp_path / folder / "checkpoints").iterdir())
    assert result["epochs"] == found[-1] == epochs
    return found

  assert kept("as ever", 4) == [3, 4]
  assert kept("one", 3, "--train.keep_checkpoints", 1) == [3]
  assert kept("four", 5, "--train.keep_checkpoints", 4) == [2, 3, 4, 5]
  # how many stay is no part of what is trained: a resumed training may keep fewer
  shutil.rmtree(tmp_path / "four" / "checkpoints" / "220")
  assert kept("four", 5, "--train.keep_checkpoints", 1) == [5]


def test_an_averaging_training_resumes_bit_for_bit(tmp_path):
  words = ("--model.hidden", 32, "--train.checkpoint_every", 1, "--train.ema", 0.9)
  call("train", "digits_paper", "--out", tmp_path / "whole", *words, "--train.epochs", 2)
  shutil.copytree(tmp_path / "whole", tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "88")
  assert (
    call(
      "train", "digits_paper", "--out", tmp_path / "run", *words, "--train.epochs", 2, "--json"
    ).json["epochs"]
    == 2
  )
  whole, resumed = (
    restored(tmp_path / name / "checkpoints" / "88" / "default") for name in ("whole", "run")
  )
  jax.tree.map(np.testing.assert_array_equal, whole["optimizer_state"], resumed["optimizer_state"])


def test_the_order_of_requests_does_not_matter(trained_once, forgotten, tmp_path):
  """3 then 5, 5 then 3, and both at once end in the same params."""
  together, reverse = (
    pathlib.Path(shutil.copytree(trained_once, tmp_path / name)) for name in ("together", "reverse")
  )
  at_once = call("forget", together, "--classes", 5, 3, "--json").json
  three_five = call("forget", forgotten, "--classes", 5, "--json").json
  only_five = call("forget", reverse, "--classes", 5, "--json").json
  five_three = call("forget", reverse, "--classes", 3, "--json").json
  assert three_five["requested"] == [5]
  assert three_five["classes"] == five_three["classes"] == at_once["classes"] == [3, 5]
  assert (
    three_five["params_sha256_after"]
    == five_three["params_sha256_after"]
    == at_once["params_sha256_after"]
  )
  assert only_five["params_sha256_after"] != at_once["params_sha256_after"]
  assert [path.name for path in RunFolder.open(reverse).forgets()] == ["0001", "0002"]


def test_what_a_killed_forget_left_behind_is_swept_away(forgotten):
  leftover = forgotten / "forgets" / ".unfinished-0002"
  (leftover / "params").mkdir(parents=True)
  (leftover / "stray").write_text("half")
  assert call("forget", forgotten, "--classes", 3).code == 0
  assert [path.name for path in sorted((forgotten / "forgets").iterdir())] == ["0001", "0002"]
  assert not (forgotten / "forgets" / "0002" / "stray").exists()


@pytest.mark.parametrize(
  "number", ["9999", *(pytest.param(n, marks=pytest.mark.long) for n in ("0001", "10000"))]
)
def test_forgets_are_counted_by_their_numbers(number, forgotten):
  if number != "0001":
    (forgotten / "forgets" / "0001").rename(forgotten / "forgets" / number)
  for classes, union in ((5, [3, 5]), (6, [3, 5, 6])):
    assert call("forget", forgotten, "--classes", classes, "--json").json["classes"] == union
  assert RunFolder.open(forgotten).forgets()[-1].name == f"{int(number) + 2:04d}"
  assert call("evaluate", forgotten, "--json").json["classes"] == [3, 5, 6]


def test_a_forget_whose_record_is_lost_is_not_passed_over(forgotten):
  (forgotten / "forgets" / "0001" / "report.json").unlink()
  for words in (
    ("forget", forgotten, "--classes", 5),
    ("evaluate", forgotten),
    ("report", forgotten),
  ):
    message = call(*words).refusal()
    assert "forgets/0001: has no report.json" in message and "forget its classes again" in message
  (
    forgotten / "forgets" / "0001" / "report.html"
  ).unlink()  # as a killed job of several processes leaves it
  assert call("forget", forgotten, "--classes", 5, "--json").json["classes"] == [5]


def test_a_failing_forget_is_not_seen(tmp_path, trained):
  run = RunFolder.open(trained)

  def fill(folder: pathlib.Path) -> None:
    (folder / "report.json").write_text("{}")
    raise MnemonicError("no")

  with run.locked(), pytest.raises(MnemonicError):
    run.add_forget(fill)
  assert run.forgets() == [] and list((trained / "forgets").iterdir()) == []


NO_RECORDS = {
  "cut": b'{"epoch": 4, "st',
  "zeros": b"\0\0\0",
  "bytes": b"\xff\xfe",
  "garbage": b'{"epoch": 4}garbage',
  "number": b"5",
  "words": b'{"epoch": "x", "step": "y"}',
  "step zero": b'{"epoch": 4, "step": 0}',
  "no step": b'{"epoch": 4}',
}


@pytest.mark.parametrize("tail", NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_cut_line_of_metrics_is_left_out(trained, tail):
  with open(trained / "metrics.jsonl", "ab") as file:
    file.write(tail)
  assert [record["epoch"] for record in RunFolder.open(trained).metrics()] == [1, 2, 3]
  assert (
    call("train", "digits_paper", "--out", trained, *TINY, "--json").json["resumed_from_epoch"] == 3
  )
  assert len((trained / "metrics.jsonl").read_text().splitlines()) == 3


def events(folder: pathlib.Path) -> list:
  """What TensorBoard reads: records of length, its checksum, event, checksum."""
  found = []
  for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
    content = file.read_bytes()
    while content:
      size = int.from_bytes(content[:8], "little")
      found.append(Event.FromString(content[12 : 12 + size]))
      content = content[16 + size :]
  return found


def test_tensorboard_sees_what_metrics_say(tmp_path):
  run = tmp_path / "run"
  call("train", "digits_paper", "--out", run, *TINY)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  first, start, *steps = events(run / "tensorboard")
  assert first.file_version == "brain.Event:2"
  assert start.session_log.status == SessionLog.START and start.step == 1
  for line, event in zip(lines, steps, strict=True):
    assert event.step == line["step"]
    scalars = {value.tag: value.simple_value for value in event.summary.value}
    assert scalars == pytest.approx(
      {name: value for name, value in line.items() if name != "step"}, rel=1e-6
    )
  shutil.rmtree(run / "checkpoints" / "132")
  call("train", "digits_paper", "--out", run, *TINY)  # once more, from the checkpoint before
  *_, again, last = events(run / "tensorboard")
  assert (again.session_log.status, again.step, last.step) == (SessionLog.START, 89, 132)
  before = snapshot(run / "tensorboard")
  call("train", "digits_paper", "--out", run, *TINY)  # nothing to do
  assert snapshot(run / "tensorboard") == before


def test_metrics_after_the_checkpoint_are_dropped_on_resume(trained):
  run = RunFolder.open(trained)
  with run.metric_log(132) as log:
    log({"epoch": 4, "step": 176, "loss": float("nan")})
  assert run.metrics()[-1]["loss"] is None
  run.rewind_metrics(132)
  assert run.metrics()[-1]["epoch"] == 3


def test_a_forget_without_the_data_set(trained, tmp_path):
  """The same params as with it, and no word on how well it went."""
  elsewhere = pathlib.Path(shutil.copytree(trained, tmp_path / "elsewhere"))
  record = json.loads((elsewhere / "config.json").read_text())
  record["config"]["data"]["name"] = "mnist"  # which is not there
  (elsewhere / "config.json").write_text(json.dumps(record))
  assert "--data-dir" in call("forget", elsewhere, "--classes", 3).refusal()
  unscored = call("forget", elsewhere, "--classes", 3, "--unscored", "--json").json
  scored = call("forget", trained, "--classes", 3, "--json").json
  same = ("params_sha256_before", "params_sha256_after", "codes_sha256", "classes", "class_names")
  same += ("method", "info", "code_forget_error")
  assert {key: unscored[key] for key in same} == {key: scored[key] for key in same}
  nothing = {"verdict": "not measured", "evidence": None, "error": None}
  assert (unscored["verdict"], unscored["verdicts"]) == ("not measured", {"3": nothing})
  assert unscored["forget_error_after"] is None
  assert (scored["read"]["score"], unscored["read"]["score"]) == ("test", None)
  assert unscored["read"]["forget"] == ["params", "codes"]
  page = (elsewhere / "forgets" / "0001" / "report.html").read_text()
  assert "It is not known whether it worked" in page
  text = call("forget", elsewhere, "--classes", 4, "--unscored")
  assert (
    text.out.startswith("tried to forget 3, 4 in ")
    and "verdict  Not measured" in text.out
    and text.err == ""
  )
  assert (
    "forgets/0002"
    in call("export", elsewhere, "--out", tmp_path / "a.safetensors", "--json").json["forget"]
  )


def test_pictures_that_are_gone_do_not_make_a_training_look_finished(trained, monkeypatch):
  record = json.loads((trained / "config.json").read_text())
  record["config"]["train"]["epochs"] = 4
  (trained / "config.json").write_text(json.dumps(record))
  real = data.load
  monkeypatch.setattr(
    data, "load", lambda *arguments, **options: real("digits").without(range(1, 10))
  )
  assert "training stands at epoch 3 of 4" in call("forget", trained, "--classes", 3).refusal()


def test_without_the_data_set_a_training_that_is_not_finished_is_known_by_its_record(trained):
  record = json.loads((trained / "config.json").read_text())
  record["config"]["train"]["epochs"] = 5
  (trained / "config.json").write_text(json.dumps(record))
  assert (
    "training stands at epoch 3 of 5"
    in call("forget", trained, "--classes", 3, "--unscored").refusal()
  )
  record["config"]["train"] |= {"epochs": 3, "steps": 140}
  (trained / "config.json").write_text(json.dumps(record))
  assert (
    "training stands at step 132 of 140"
    in call("forget", trained, "--classes", 3, "--unscored").refusal()
  )
  record["config"]["train"]["steps"] = 0
  (trained / "config.json").write_text(json.dumps(record))
  (trained / "metrics.jsonl").unlink()
  assert (
    "has no line up to step 132" in call("forget", trained, "--classes", 3, "--unscored").refusal()
  )


def test_a_run_that_became_another_while_it_waited_is_not_trained(tmp_path):
  run = RunFolder.create(tmp_path / "run", configs.load("digits"))
  RunFolder.create(
    tmp_path / "run", configs.load("digits", {"train.epochs": 5})
  )  # nothing is there yet: allowed
  with pytest.raises(
    MnemonicError, match=r"another command has made it .*train\.epochs 5 there, \d+ here"
  ):
    train_run.train(run, data.load("digits"))
  assert not run.checkpoints.exists()


def test_a_model_that_answers_nan_names_no_class(trained_once):
  """A model that overflows on real pictures is wrong on all of them; none counts as class 0."""
  run = RunFolder.open(trained_once)
  dataset = data.load("digits")
  model = trained_run.restore(run, dataset)
  broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model.params)
  (seen,) = scoring.predict_each(model.logits_fn, [broken], dataset.test, dataset.preprocess)
  assert set(seen.predictions.tolist()) == {-1}
  predict = lambda candidates, split: scoring.predict_each(
    model.logits_fn, candidates, split, dataset.preprocess
  )
  (scored,) = scoring.scored(predict, [broken], dataset, [3])
  assert (scored.scores.retain_accuracy, scored.scores.forget_error) == (0.0, 1.0)
  assert scored.scores.per_class.tolist() == [0.0] * 10


def test_versions_and_prng_are_recorded(trained_once):
  record = json.loads((trained_once / "config.json").read_text())
  assert record["prng_impl"] == "threefry2x32"
  assert record["versions"]["jax"] == jax.__version__


def test_a_signal_waits_for_the_checkpoint_and_a_late_one_is_not_lost():
  with pytest.raises(Interrupted, match="stopped") as caught, signals.deferred() as stop:
    stop.stop_if_asked("not yet")
    signal.raise_signal(signal.SIGTERM)
    stop.stop_if_asked("stopped")
  assert caught.value.exit_code == 143
  with pytest.raises(KeyboardInterrupt), signals.deferred():
    signal.raise_signal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), signals.deferred():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    pytest.fail("the second Ctrl-C waited")


def test_a_signal_after_the_checkpoints_turn_ends_with_a_checkpoint_all_the_same(
  tmp_path, monkeypatch
):
  """It comes when epoch 1 is over, which writes none: the epoch in the message must be on disk."""
  real, calls = Progress.update, []

  def update(self, *args, **values):
    real(self, *args, **values)
    calls.append(1)
    if len(calls) == 1:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(Progress, "update", update)
  run = tmp_path / "run"
  message = call(
    "train",
    "digits_paper",
    "--out",
    run,
    "--model.hidden",
    32,
    "--train.epochs",
    9,
    "--train.checkpoint_every",
    9,
  )
  assert message.code == 143
  epoch = int(message.err.split("stopped after epoch ")[1].split()[0])
  assert (run / "checkpoints" / str(44 * epoch)).is_dir()


CONVNET = ("--model.name", "resnet10_small", "--model.width", "4", "--data.augment", "crop_flip")
CONVNET = (*CONVNET, "--train.batch_size", "128", "--train.epochs", "2")


def test_a_convnet_stopped_inside_an_epoch_goes_on_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setitem(models._RESNETS, "resnet10_small", {"depths": (1,), "small_stem": True})
  whole = call("train", "digits_paper", "--out", tmp_path / "whole", *CONVNET, "--json").json
  real, calls = Progress.update, []

  def update(self, *args, **values):
    real(self, *args, **values)
    calls.append(1)
    if len(calls) == 13:  # shown while the third of 11 steps of the second epoch runs
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(Progress, "update", update)
    stopped = call("train", "digits_paper", "--out", tmp_path / "run", *CONVNET)
  assert stopped.code == 143 and "stopped after epoch 1.273 of 2" in stopped.err
  assert (tmp_path / "run" / "checkpoints" / "14").is_dir()
  with (
    monkeypatch.context() as elsewhere
  ):  # where an epoch is one call, the rest of this one is not
    elsewhere.setattr(jax, "default_backend", lambda: "gpu")
    resumed = call("train", "digits_paper", "--out", tmp_path / "run", *CONVNET, "--json").json
  assert resumed["resumed_from_epoch"] == pytest.approx(14 / 11)
  assert resumed["params_sha256"] == whole["params_sha256"]
  lines = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["epoch"] for line in lines] == [1, 2]
  forgotten = call("forget", tmp_path / "run", "--classes", 3, "--json").json
  assert forgotten["classes"] == [3] and forgotten["params_sha256_before"] == whole["params_sha256"]
  assert (
    call("forget", tmp_path / "whole", "--classes", 3, "--json").json["params_sha256_after"]
    == (forgotten["params_sha256_after"])
  )


def test_pictures_lie_as_bytes_and_are_augmented_on_the_way_to_the_model(tmp_path, monkeypatch):
  seen = set()
  real = data.Dataset.preprocess

  def preprocess(self, images):
    seen.add((type(images).__name__, images.dtype))
    return real(self, images)

  monkeypatch.setattr(data.Dataset, "preprocess", preprocess)
  hashes = {
    augment: call(
      "train",
      "digits_paper",
      "--out",
      tmp_path / augment,
      *TINY,
      "--data.augment",
      augment,
      "--json",
    ).json["params_sha256"]
    for augment in ("none", "crop_flip")
  }
  assert hashes["none"] != hashes["crop_flip"]
  assert {dtype for _, dtype in seen} == {np.dtype(np.uint8)} and "DynamicJaxprTracer" in {
    kind for kind, _ in seen
  }
