"""The examples with a training loop of the user's own do what they say, and what codes cost is told."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"


def load(name):
  path = EXPERIMENTS / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("library", ["linen", "equinox"])
def test_an_own_loop_forgets_its_class_and_keeps_the_rest(library, capsys):
  if library == "equinox":
    pytest.importorskip("equinox")
  assert len((EXPERIMENTS / f"own_loop_{library}.py").read_text().splitlines()) <= 90
  scores = load(f"own_loop_{library}").main()
  before, forgotten, hidden = (scores[name] for name in ("before", "mnemonic code", "head edit"))
  assert before.retain_accuracy > 0.95 and before.forget_error < 0.1
  assert forgotten.forget_error >= 0.97
  assert forgotten.retain_accuracy > before.retain_accuracy - 0.02
  assert hidden.forget_error == 1.0
  rows = capsys.readouterr().out.splitlines()
  assert len(rows) == 5 and all(row.count("|") == 4 for row in rows)
  assert rows[3] == f"| mnemonic code | {forgotten.retain_accuracy:.2%} | {forgotten.forget_error:.2%} |"


def test_what_codes_cost(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(str(EXPERIMENTS))
  study = load("code_cost")
  monkeypatch.setattr(study.common, "RESULTS", tmp_path / "results")
  few = ["--model.hidden", "64", "--train.epochs", "3", "--rates", "0.5", "--per-class", "2"]
  monkeypatch.setattr(sys, "argv", ["code_cost.py", "digits", "--runs", str(tmp_path / "runs"), *few])
  study.main()
  rows = [row.split("|")[1:-1] for row in capsys.readouterr().out.splitlines() if row.startswith("| 0")]
  assert [[cell.strip() for cell in row[:2]] for row in rows] == [["0", "-"], ["0.5", "2"]]
  assert rows[0][3].strip() == "-" and 0 <= float(rows[1][3]) <= 100
  saved = json.loads((tmp_path / "results" / "code_cost_digits_digits.json").read_text())
  values = np.array([row["values"] for row in saved["rows"]])
  assert values.shape == (2, 1, 2) and np.all(values[:, :, 0] > 50)
  assert abs(float(rows[0][2].split("±")[0]) - values[0, :, 0].mean()) < 0.01
  assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["0.5_2", "0_1"]
  monkeypatch.setattr(sys, "argv", ["code_cost.py", "digits", "--codes.rate", "0.5"])
  with pytest.raises(SystemExit):
    study.main()
  assert "--codes.rate: is varied here" in capsys.readouterr().err
