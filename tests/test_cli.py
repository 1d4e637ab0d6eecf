"""The commands when all goes well: output, progress, help, overrides, configs."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import termios
from datetime import datetime, timedelta

import pytest
from running import COMMAND, FORGET_KEYS, HANG, TINY, call, environment, finish, start

from mnemonic_jax import data
from mnemonic_jax.cli import commands, parser
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import config as configs

pytest_plugins = ["run_fixtures"]

VERBS = ("run", "train", "forget", "evaluate", "report", "export", "configs")
TRAIN_KEYS = {
  "run",
  "config",
  "epochs",
  "steps",
  "test_accuracy",
  "checkpoint",
  "codes_sha256",
  "params_sha256",
}


def test_run_trains_forgets_and_reports(tmp_path):
  """As the installed console script, in a process of its own, with stderr no terminal."""
  script = pathlib.Path(sys.executable).with_name("mnemonic")
  if not script.exists():
    pytest.skip("the package is not installed beside this Python")
  words = [str(script), "run", "digits_paper", *TINY, "--forget.classes", "3", "5", "--json"]
  process = subprocess.Popen(
    words,
    cwd=tmp_path,
    env=environment(),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  outcome = finish(process)
  result = outcome.json
  assert outcome.out.count("\n") == 1
  assert set(result) == {"train", "forget"}
  assert result["train"].keys() >= TRAIN_KEYS and result["forget"].keys() >= FORGET_KEYS
  assert result["forget"]["classes"] == [3, 5]
  assert datetime.fromisoformat(result["forget"]["time"]).utcoffset() == timedelta(0)
  assert result["train"]["params_sha256"] == result["forget"]["params_sha256_before"]
  assert result["train"]["codes_sha256"] == result["forget"]["codes_sha256"]
  assert (tmp_path / result["forget"]["report"]).read_text().startswith("<!doctype html>")
  assert sorted(
    path.name for path in (tmp_path / "runs" / "digits_paper").iterdir() if path.name[0] != "."
  ) == [
    "checkpoints",
    "config.json",
    "forgets",
    "ledger.jsonl",
    "metrics.jsonl",
    "tensorboard",
  ]
  lines = outcome.err.splitlines()
  assert lines and all(
    re.fullmatch(r"train: \d/3 epochs, .*epochs/s, \d+ s left", line) for line in lines
  ), lines


def test_progress_is_a_bar_on_a_terminal(tmp_path):
  terminal, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 120))
  process = start(
    "train", "digits_paper", "--out", tmp_path / "run", *TINY, "--json", stderr=theirs
  )
  os.close(theirs)
  shown = b""
  while True:
    try:
      shown += os.read(terminal, 4096)
    except OSError:  # how a terminal says that its other end is closed
      break
  out, _ = process.communicate(timeout=HANG)
  assert process.returncode == 0
  assert json.loads(out)["epochs"] == 3
  text = shown.decode()
  assert "\r" in text and "3/3" in text and "epochs/s" in text and "Traceback" not in text
  assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", text), text  # time spent < time left


def test_each_verb_prints_one_json_object(forgotten):
  evaluated = call("evaluate", forgotten, "--json").json
  assert evaluated["classes"] == [3]
  for name in ("trained", "forgotten"):
    assert evaluated[name].keys() >= {
      "retain_accuracy",
      "forget_error",
      "per_class_accuracy",
      "accuracy",
    }
  assert evaluated["trained"]["forget_error"] < evaluated["forgotten"]["forget_error"]
  report = json.loads((forgotten / "forgets" / "0001" / "report.json").read_text())
  assert evaluated["forgotten"]["retain_accuracy"] == report["retain_accuracy_after"]
  assert evaluated["trained"]["per_class_accuracy"] == report["per_class_accuracy_before"]
  assert call("report", forgotten, "--json").json == {
    "report": str(forgotten / "forgets" / "0001" / "report.html")
  }
  assert set(call("configs", "--json").json) == set(configs.names())
  assert call("configs", "digits", "--json").json["train"]["seed"] == 0


def text_of(report: dict, **changes: object) -> str:
  """The text of a forget on the digits whose JSON is `report`, with changes."""
  names = [str(c) for c in range(10)]
  return commands._forget_text({**report, "report": "page", **changes}, names)


@pytest.fixture
def report(forgotten_once):
  return json.loads((forgotten_once / "forgets" / "0001" / "report.json").read_text())


def test_a_class_without_test_examples_has_no_error(report):
  unknown = dict.fromkeys(("forget_error_before", "forget_error_after"))
  accuracies = [None if c == 3 else 1.0 for c in range(10)]
  text = text_of(report, **unknown, per_class_accuracy_after=accuracies, verdict="not measured")
  assert re.search(r"error, forgotten classes +none +none\n", text) and "nan" not in text
  assert text.startswith("tried to forget 3 in ") and "\n  verdict  Not measured\n" in text


def test_a_class_that_was_not_forgotten_is_not_called_so(report):
  error = report["forget_error_after"]
  verdict = {"verdict": "not forgotten", "evidence": "test", "error": pytest.approx(error)}
  assert (report["verdict"], report["verdicts"]) == ("not forgotten", {"3": verdict})
  text = text_of(report)
  assert text.startswith("tried to forget 3 in ") and "\n  verdict  Not forgotten\n" in text
  gone = {"forget_error_after": 1.0, "retain_accuracy_after": report["retain_accuracy_before"]}
  gone["per_class_accuracy_after"] = [0.0 if c == 3 else 1.0 for c in range(10)]
  text = text_of(report, **gone, verdict="forgotten")
  assert text.startswith("forgot 3 in ") and "\n  verdict  Forgotten\n" in text
  text = text_of(report, **gone, copies={"ema": report})
  assert text.startswith("tried to forget 3 in ")
  assert "verdict  Forgotten; their average: Not forgotten\n" in text


def test_the_text_of_a_forget_tells_method_settings_and_info(report):
  method = {"name": "scissors", "depth": 2}
  text = text_of(report, method=method, info={"cuts": 3}, seconds={"compile": 1, "total": 2.5})
  assert "in 2.50 s (compile 1)" in text and "\n  method   scissors, depth = 2; cuts = 3\n" in text
  assert "method   perturbation, lambda1 = 0.003, lambda2 = 0.3; sign = " in text_of(report)


def test_classes_by_name_and_a_method_with_settings(forgotten, monkeypatch):
  digits = data.load("digits")
  names = ("zero", "one", "two", "three", "four", "five", "6", "seven", "eight", "nine")
  monkeypatch.setattr(data, "load", lambda *_, **__: dataclasses.replace(digits, class_names=names))
  words = ("--classes", "seven", 5, "--method", "perturbation", "--set", "lambda1=1e-3")
  result = call("forget", forgotten, *words, "--set=lambda2=7", "--json").json
  assert (result["requested"], result["classes"]) == ([7, 5], [3, 5, 7])
  assert result["class_names"] == list(result["verdicts"]) == ["three", "five", "seven"]
  assert result["method"] == {"name": "perturbation", "lambda1": 1e-3, "lambda2": 7.0}
  assert result["info"].keys() == {"sign"} and result["read"]["score"] == "test"
  text = call("forget", forgotten, "--classes", "one").out
  assert (
    text.splitlines()[0].split(" in ")[0].endswith("forget 1 (one), 3 (three), 5 (five), 7 (seven)")
  )
  assert "classes 2 (two), 6 counted as" in call("evaluate", forgotten, "--classes", "two", 6).out
  message = call("forget", forgotten, "--classes", "sevn").refusal(2)
  assert "classes: got sevn; expected an index from 0 to 9, or the name of a class" in message
  assert "Did you mean seven?" in message


def test_each_verb_prints_text_for_people(forgotten):
  evaluated = call("evaluate", forgotten, "--classes", 3, 4)
  assert (evaluated.code, evaluated.err) == (0, "")
  assert (
    "classes 3, 4 counted as forgotten" in evaluated.out and "error of forgotten" in evaluated.out
  )
  everything = call("evaluate", forgotten, "--classes", *range(10))
  assert (everything.code, "accuracy of kept none" in everything.out, "nan" in everything.out) == (
    0,
    True,
    False,
  )
  again = call("forget", forgotten, "--classes", 5, "--set", "lambda1=0.5")
  assert (
    re.match(r"tried to forget 3, 5 in \d+\.\d\d s", again.out) and again.err == ""
  )  # three epochs are too few
  second = json.loads((forgotten / "forgets" / "0002" / "report.json").read_text())
  assert second["method"] == {"name": "perturbation", "lambda1": 0.5, "lambda2": 0.3}
  trained = call("train", "digits_paper", "--out", forgotten, *TINY)
  assert trained.out.startswith("trained digits_paper: 3 epochs")
  listed = call("configs")
  assert [line.split()[0] for line in listed.out.splitlines()] == configs.names()
  assert call("configs", "digits").out == configs.text("digits").rstrip() + "\n"


def test_the_report_can_hide_the_codes(forgotten):
  page = forgotten / "forgets" / "0001" / "report.html"
  original = page.read_text()
  assert call("report", forgotten, "--hide-codes").out == f"{page}\n"
  assert len(page.read_text()) < len(original)
  assert call("report", forgotten, "--number", 1).code == 0
  assert page.read_text() == original


def test_help_has_an_example_and_does_not_wait_for_jax():
  program = (
    "import io, sys, contextlib\n"
    "from mnemonic_jax.cli import main\n"
    f"for verb in {VERBS}:\n"
    "  out = io.StringIO()\n"
    "  with contextlib.redirect_stdout(out):\n"
    "    try: main([verb, '--help'])\n"
    "    except SystemExit as end: assert end.code == 0\n"
    "  assert f'example:\\n  mnemonic {verb} ' in out.getvalue(), out.getvalue()\n"
    "slow = {'jax', 'numpy', 'flax', 'orbax', 'sklearn', 'tensorflow_datasets'}\n"
    "slow &= set(sys.modules)\n"
    "assert not slow, slow\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_help_names_every_verb():
  outcome = call("--help")
  assert outcome.code == 0 and all(f"\n    {verb} " in outcome.out for verb in VERBS)


@pytest.mark.parametrize(
  ("words", "classes"),
  [
    ("train C --out R --train.epochs 1 --model.hidden=8 --forget.classes 3 dog", ["3", "dog"]),
    ("train --train.epochs 1 --model.hidden 8 C --forget.classes 3 5 --out R", ["3", "5"]),
    ("train --forget.classes=[3,5] --json --out=R C --train.epochs=1 --model.hidden=8", [3, 5]),
    ("train --forget.classes [3,5] C --out R --train.epochs=1 --model.hidden=8", [3, 5]),
    ("train --forget.classes=dog C --out R --train.epochs=1 --model.hidden=8", "dog"),
  ],
)
def test_overrides_may_stand_anywhere(words, classes):
  options = parser.parse(words.split())
  assert (options.config, options.out.name) == ("C", "R")
  expected = {"train.epochs": 1, "model.hidden": 8, "forget.classes": classes}
  assert options.overrides == expected


def test_classes_of_a_config_may_be_names(tmp_path):
  """They are kept as given, and turned into indices when the data set is known."""
  words = (*TINY, "--forget.classes", 3, "7")
  result = call("run", "digits_paper", "--out", tmp_path / "run.1", *words, "--json").json
  config = json.loads((tmp_path / "run.1" / "config.json").read_text())["config"]
  assert config["forget"]["classes"] == ["3", "7"] and result["forget"]["classes"] == [3, 7]
  message = call(
    "run", "digits_paper", "--out", tmp_path / "no", "--forget.classes", "dog"
  ).refusal(2)
  assert "classes: got dog" in message and not (tmp_path / "no").exists()


def test_a_negative_number_is_a_value():
  assert parser.dotted_overrides(["--codes.rate", "-1"]) == ({"codes.rate": -1}, [])


def test_a_config_file_without_a_method(tmp_path):
  """It trains; to forget by the codes of training, a method must be named."""
  file = tmp_path / "mine.toml"
  file.write_text(
    '[model]\nhidden = 8\n[codes]\nrate = 0.1\n[train]\nepochs = 2\nschedule = "cosine"\n'
  )
  result = call("train", file, "--out", tmp_path / "run", "--train.epochs", 1, "--json").json
  assert (result["config"], result["epochs"]) == ("mine", 1)
  message = call("forget", tmp_path / "run", "--classes", 3).refusal(2)
  assert re.search("forget.method: missing; expected one of .*perturbation", message)
  words = ("--method", "perturbation", "--set", "lambda1=1e-3", "--set", "lambda2=1")
  assert call("forget", tmp_path / "run", "--classes", 3, *words).code == 0


def test_what_the_commands_need_is_package_data():
  root = importlib.resources.files("mnemonic_jax")
  for name in (
    "runs/configs/digits.toml",
    "runs/configs/mnist_mlp.toml",
    "report/template.html.j2",
    "report/style.css",
    "py.typed",
  ):
    assert root.joinpath(name).is_file(), name


def test_a_reader_that_goes_away_is_no_error_message():
  process = subprocess.Popen(
    f"{' '.join(map(repr, COMMAND))} configs digits | true",
    shell=True,
    env=environment(),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert finish(process).err == ""


def test_debugging_shows_where(monkeypatch):
  monkeypatch.setenv("MNEMONIC_DEBUG", "1")
  with pytest.raises(MnemonicError, match="nowhere: no such run folder"):
    call("evaluate", "nowhere")
