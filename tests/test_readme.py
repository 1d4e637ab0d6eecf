"""The README's quick start and the guide are run as they are printed."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_the_quick_start_forgets_and_the_guide_goes_on_from_it(capsys):
  names: dict = {}
  for page in ("README.md", "docs/guide.md"):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL):
      exec(block, names)
  evaluate, test = names["mj"].evaluate, names["test"]
  before = evaluate(names["logits_fn"], names["state"].params, test, classes=[0])
  after = evaluate(names["logits_fn"], names["result"].params, test, classes=[0])
  assert before.forget_error <= 0.1
  assert after.forget_error >= 0.95 and after.retain_accuracy >= 0.94
  lowered = evaluate(names["logits_fn"], names["lowered"].params, test, classes=[0])
  assert lowered.forget_error == 1.0 and lowered.retain_accuracy >= before.retain_accuracy
  default = evaluate(names["logits_fn"], names["by_default"].params, test, classes=[0])
  assert default.forget_error == 1 and default.retain_accuracy >= before.retain_accuracy - 0.01
  printed = capsys.readouterr().out
  assert printed.count("Scores(retain_accuracy=") == 5 and "kFLOP/example" in printed
  leaves = names["jax"].tree.leaves
  assert all(leaf.shape[0] == 10 for leaf in leaves((names["fisher"], names["each_params"])))


def test_the_demo_by_hand_is_that_of_make():
  makefile, build = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "BUILD.md"))
  recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
  commands = [line for line in recipe[1].split("\n\t") if "$(BIN)" in line]
  by_hand = "\n".join(commands).replace("$(BIN)", ".venv/bin").strip()
  assert len(commands) == 3 and f"\n{by_hand}\n```" in build


def test_the_first_screen_has_the_two_commands():
  first_screen = (ROOT / "README.md").read_text("utf-8").splitlines()[:36]
  assert any(line.startswith("make demo") for line in first_screen)
  assert any(line.startswith("make test") for line in first_screen)
