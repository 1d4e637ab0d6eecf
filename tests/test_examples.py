"""The examples with a training loop of the user's own do what they say."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"


@pytest.mark.parametrize("library", ["linen", "equinox"])
def test_an_own_loop_forgets_its_class_and_keeps_the_rest(library, capsys):
  if library == "equinox":
    pytest.importorskip("equinox")
  path = EXPERIMENTS / f"own_loop_{library}.py"
  assert len(path.read_text().splitlines()) <= 90
  spec = importlib.util.spec_from_file_location(path.stem, path)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  scores = example.main()
  before, forgotten, hidden = (scores[name] for name in ("before", "mnemonic code", "head edit"))
  assert before.retain_accuracy > 0.95 and before.forget_error < 0.1
  assert forgotten.forget_error >= 0.97
  assert forgotten.retain_accuracy > before.retain_accuracy - 0.02
  assert hidden.forget_error == 1.0
  rows = capsys.readouterr().out.splitlines()
  assert len(rows) == 5 and all(row.count("|") == 4 for row in rows)
  assert rows[3] == f"| mnemonic code | {forgotten.retain_accuracy:.2%} | {forgotten.forget_error:.2%} |"
