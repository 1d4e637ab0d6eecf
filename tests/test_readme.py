"""The README's quick start is run as it is printed."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_quick_start_forgets_and_keeps_the_rest(capsys):
  names: dict = {}
  for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL):
    exec(block, names)
  digits = names["digits"]
  test = [(digits.preprocess(digits.test.images), digits.test.labels)]
  scores = names["mj"].evaluate(names["logits_fn"], names["result"].params, test, classes=[0])
  assert scores.forget_error >= 0.95
  assert scores.retain_accuracy >= 0.94
  printed = capsys.readouterr().out
  assert "Scores(retain_accuracy=" in printed and "kFLOP/example" in printed
  assert all(leaf.shape[0] == 10 for leaf in names["jax"].tree.leaves(names["fisher"]))


def test_first_screen_has_the_two_commands():
  first_screen = README.read_text("utf-8").splitlines()[:30]
  assert any(line.startswith("make demo") for line in first_screen)
  assert any(line.startswith("make test") for line in first_screen)
