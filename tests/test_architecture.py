"""The README's diagram, enforced: who may import whom, and what the core may never import."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest
from running import HANG

import mnemonic_jax

PACKAGE = pathlib.Path(mnemonic_jax.__file__).parent

# One entry per module or package directly under mnemonic_jax; each imports from its own stage and
# from earlier ones only. To add a module, add it here at the place where it belongs in the data
# flow.
BASE = ("errors", "_types", "_functions", "_checks", "_trees", "_mesh", "_records")
CORE = (
  "losses",
  "codes",
  "training",
  "fisher",
  "learning",
  "evaluation",
  "methods",
  "forgetting",
)
EDGES = (
  "progress",
  "multihost",
  "models",
  "data",
  "auditing",
  "rivals",
  "report",
  "runs",
  "cli",
)
STAGES = (*BASE, *CORE, *EDGES)

CORE_MAY_IMPORT = {"jax", "numpy", "optax"}
AUDIT_MAY_IMPORT = CORE_MAY_IMPORT | {"scipy", "sklearn"}
REPORT_MAY_NOT_IMPORT = {"flax", "orbax", "grain", "tensorflow_datasets", "tensorflow"}
BLOCKED_FOR_CORE = (
  "flax",
  "orbax",
  "grain",
  "tensorflow_datasets",
  "tensorflow",
  "sklearn",
  "PIL",
  "jinja2",
  "tqdm",
)

NAMES = [
  "softmax_cross_entropy",
  "make_codes",
  "mix",
  "TrainState",
  "init_train_state",
  "make_train_step",
  "Execution",
  "diagonal_fisher",
  "FisherPlan",
  "LeafPlan",
  "explain_fisher",
  "LearnedCodes",
  "learn_codes",
  "Scores",
  "evaluate",
  "Projection",
  "ProjectionPlan",
  "explain_projection",
  "DropRow",
  "Relearn",
  "Dampening",
  "Perturbation",
  "amplitude",
  "layer_scale",
  "perturb",
  "choose_sign",
  "CannotForget",
  "ForgetInfo",
  "ForgetResult",
  "forget",
  "forget_step",
  "Subject",
  "audit",
  "AuditReport",
]


def modules():
  """(path, stage) of every Python file of the package but its own __init__."""
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts != ("__init__",):
      yield path, parts[0]


def imported(path):
  """Dotted names that a file imports, anywhere in it.

  `from package import a, b` gives package.a and package.b.
  """
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import; write it in full"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def stages_imported(path):
  """The stages of ours that a file imports."""
  for name in imported(path):
    head, *rest = name.split(".")
    if head == "mnemonic_jax" and rest:
      # A name exported by the package stands for the module that it comes from.
      stage = mnemonic_jax._MODULE_OF.get(rest[0], rest[0]).partition(".")[0]
      if stage != "__version__":
        yield stage


MODULES = [
  pytest.param(path, stage, id=str(path.relative_to(PACKAGE))) for path, stage in modules()
]


@pytest.mark.parametrize(("path", "stage"), MODULES)
def test_a_module_imports_only_from_stages_before_it(path, stage):
  extend = (
    "is in no stage: extend STAGES in this test, at the place where it belongs in the data flow"
  )
  assert stage in STAGES, f"{path.name} {extend}"
  for other in stages_imported(path):
    assert other in STAGES, f"{other}, which {path.name} imports, {extend}"
    assert STAGES.index(other) <= STAGES.index(stage), (
      f"{path.name} of stage {stage} imports the later stage {other}"
    )


def test_the_table_has_no_module_that_is_gone():
  assert set(BASE + CORE) <= {stage for _, stage in modules()}


@pytest.mark.parametrize(("path", "stage"), [p for p in MODULES if p.values[1] in BASE + CORE])
def test_the_core_imports_jax_numpy_and_optax_only(path, stage):
  outside = {name.split(".")[0] for name in imported(path)} - {"mnemonic_jax", "__future__"}
  third_party = outside - set(sys.stdlib_module_names)
  assert third_party <= CORE_MAY_IMPORT


@pytest.mark.parametrize(("path", "stage"), [p for p in MODULES if p.values[1] == "auditing"])
def test_the_audit_takes_any_function(path, stage):
  ours = {name.split(".")[1] for name in imported(path) if name.startswith("mnemonic_jax.")}
  assert ours <= {*BASE, *CORE, "auditing"}
  outside = {name.split(".")[0] for name in imported(path)} - {"mnemonic_jax", "__future__"}
  assert outside - set(sys.stdlib_module_names) <= AUDIT_MAY_IMPORT


@pytest.mark.parametrize(("path", "stage"), [p for p in MODULES if p.values[1] == "report"])
def test_the_report_needs_no_model_library(path, stage):
  assert not {name.split(".")[0] for name in imported(path)} & REPORT_MAY_NOT_IMPORT


def run(code):
  return subprocess.run(
    [sys.executable, "-W", "error::ImportWarning", "-c", code],
    capture_output=True,
    text=True,
    timeout=HANG,
  )


def test_the_core_works_with_everything_else_blocked():
  code = f"""
import sys
for name in {BLOCKED_FOR_CORE!r}:
  sys.modules[name] = None  # importing it raises ImportError
import importlib, jax, jax.numpy as jnp, mnemonic_jax as mj
for name in {BASE + CORE!r}:
  importlib.import_module("mnemonic_jax." + name)
for name, module in mj._MODULE_OF.items():
  if module.split(".")[0] in {BASE + CORE!r}:
    getattr(mj, name)
codes = mj.make_codes(jax.random.key(0), 3, (8,))
result = mj.forget(lambda w, x: x @ w, codes[:, 0].T, codes, [0], method=mj.Perturbation(1.0, 10.0))
assert result.info["sign"] in (1, -1)
loaded = [name for name in sys.modules if name.startswith("mnemonic_jax.")]
assert {{name.split(".")[1] for name in loaded}} <= set({BASE + CORE!r}), loaded
print("works")
"""
  done = run(code)
  assert done.stdout == "works\n", done.stderr


def test_importing_the_package_does_not_import_jax():
  done = run("import sys, mnemonic_jax; dir(mnemonic_jax); print('jax' in sys.modules)")
  assert done.stdout == "False\n", done.stderr


def test_the_list_of_names_is_held():
  assert mnemonic_jax.__all__ == NAMES, (
    "The public names changed: that is an API change; say so in the CHANGELOG."
  )
  assert list(mnemonic_jax._MODULE_OF) == NAMES


def test_names_resolve_and_checkers_see_the_same_ones():
  for name in NAMES:
    assert getattr(mnemonic_jax, name).__module__ == f"mnemonic_jax.{mnemonic_jax._MODULE_OF[name]}"
    assert name in dir(mnemonic_jax)
  tree = ast.parse((PACKAGE / "__init__.py").read_text())
  checking = next(
    node
    for node in tree.body
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
  )
  seen = {alias.name: node.module for node in checking.body for alias in node.names}
  assert seen == {
    name: f"mnemonic_jax.{module}" for name, module in mnemonic_jax._MODULE_OF.items()
  }


def test_an_unknown_name_is_refused_with_the_known_ones():
  with pytest.raises(AttributeError, match=r"no attribute 'forgett'; it has .*forget_step"):
    mnemonic_jax.forgett  # noqa: B018


def test_the_core_stays_small():
  """Files of 100 to 250 lines tell a story; one above 480 hides one."""
  for path, stage in modules():
    if stage in BASE + CORE:
      assert len(path.read_text().splitlines()) <= 480, f"{path.name} grew: split it, or say less"
