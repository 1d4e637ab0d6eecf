"""The examples with a user's own training loop, and the studies of any config.

The examples do what they say; the studies print what they save.
"""

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
  assert (
    rows[3] == f"| mnemonic code | {forgotten.retain_accuracy:.2%} | {forgotten.forget_error:.2%} |"
  )


def test_what_codes_cost(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(str(EXPERIMENTS))
  study = load("code_cost")
  monkeypatch.setattr(study.common, "RESULTS", tmp_path / "results")
  few = ["--model.hidden", "64", "--train.epochs", "3", "--rates", "0.5", "--per-class", "2"]
  monkeypatch.setattr(
    sys, "argv", ["code_cost.py", "digits_paper", "--runs", str(tmp_path / "runs"), *few]
  )
  study.main()
  rows = [
    row.split("|")[1:-1] for row in capsys.readouterr().out.splitlines() if row.startswith("| 0")
  ]
  assert [[cell.strip() for cell in row[:2]] for row in rows] == [["0", "-"], ["0.5", "2"]]
  saved = json.loads(
    (
      tmp_path / "results" / "code_cost_digits_paper_model.hidden_64_train.epochs_3.json"
    ).read_text()
  )
  assert saved["columns"] == list(study.Row._fields)
  values = np.array([row["values"] for row in saved["rows"]])
  assert (
    values.shape == (2, 1, 7)
    and np.all((values >= 0) & (values <= 100))
    and np.all(values[:, :, 0] > 50)
  )
  named = dict(zip(saved["columns"], values[1, 0], strict=True))
  assert (
    named["codes_told"] > 90
    and named["forget_error"] > 90
    and abs(named["retain_after"] - named["retain_before"]) < 20
  )
  assert abs(float(rows[0][2].split("±")[0]) - values[0, :, 0].mean()) < 0.01
  assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["0.5_2", "0_1"]
  monkeypatch.setattr(sys, "argv", ["code_cost.py", "digits_paper", "--codes.rate", "0.5"])
  with pytest.raises(SystemExit):
    study.main()
  assert "--codes.rate: is varied here" in capsys.readouterr().err
  monkeypatch.setattr(sys, "argv", ["code_cost.py", "digits_paper", "--forget.classes", "3", "5"])
  with pytest.raises(SystemExit):
    study.main()
  assert "--forget.classes: got ['3', '5']; expected one class" in capsys.readouterr().err


@pytest.mark.long
def test_the_papers_tables_for_a_changed_config(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(str(EXPERIMENTS))
  study = load("paper_tables")
  monkeypatch.setattr(study.common, "RESULTS", tmp_path / "results")
  monkeypatch.chdir(tmp_path)
  few = ["--model.hidden", "64", "--train.epochs", "3", "--seeds", "0", "1"]
  monkeypatch.setattr(sys, "argv", ["paper_tables.py", "digits_paper", *few])
  study.main()
  rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| Retrain |")]
  saved = json.loads(
    (
      tmp_path / "results" / "paper_tables_digits_paper_model.hidden_64_train.epochs_3.json"
    ).read_text()
  )
  assert saved["overrides"] == {"model.hidden": 64, "train.epochs": 3}
  assert set(saved["one_class"]) == {"Before", "Mnemonic code", "Head edit", "Retrain"}
  values = np.array([saved["one_class"][name] for name in ("Before", "Head edit", "Retrain")])
  assert values.shape == (3, 2, 3) and np.all(values[:, :, 0] > 50)
  assert np.all(values[1:, :, 1] == 100) and np.all(values[0, :, 1] < 100)
  assert f"{values[2, :, 0].mean():.2f} ± {values[2, :, 0].std():.2f}" in rows[0]
  assert [row["class"] for row in saved["every_class"]["(0.003, 0.3)"]] == list(range(10))
  folder = tmp_path / "runs" / "digits_paper_model.hidden_64_train.epochs_3"
  assert sorted(str(path.relative_to(folder)) for path in folder.glob("*/*")) == [
    "codes/0",
    "codes/1",
    "retrain/0",
    "retrain/1",
  ]
  monkeypatch.setattr(sys, "argv", ["paper_tables.py", "digits_paper", "--train.seed", "3"])
  with pytest.raises(SystemExit):
    study.main()
  assert "--train.seed: is varied here" in capsys.readouterr().err


def test_a_checkpoint_alone_is_enough(capsys):
  spec = importlib.util.spec_from_file_location(
    "forget_a_checkpoint", EXPERIMENTS.parent / "examples" / "forget_a_checkpoint.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  before, after = module.main()
  assert before.retain_accuracy > 0.9 and before.forget_error < 0.15
  assert after.forget_error == 1 and after.retain_accuracy >= before.retain_accuracy
  assert "method: Projection(depth=0" in capsys.readouterr().out
