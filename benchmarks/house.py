"""Count the house: files, lines, arrows between modules; traces and programs of one forget.

Command:  python benchmarks/house.py [CHECKOUT]

An arrow is a pair of files, one of which imports the other. A stage is a module or a package
directly under mnemonic_jax. With another CHECKOUT only its files are counted. The figures of
docs/design.md come from here.
"""

from __future__ import annotations

import ast
import contextlib
import pathlib
import sys
from collections.abc import Iterator

FOLDERS = ("mnemonic_jax", "tests", "experiments", "benchmarks")
WIDTH = 100


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Dotted name -> file of every module of the library."""
  files = sorted((root / "mnemonic_jax").rglob("*.py"))
  dotted = lambda path: ".".join(path.relative_to(root).with_suffix("").parts)
  return {dotted(path).removesuffix(".__init__"): path for path in files}


def imported(tree: ast.AST) -> Iterator[str]:
  """Dotted names that a file imports; `from package import a` gives package.a."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(root: pathlib.Path) -> set[tuple[str, str]]:
  """Pairs (importing module, imported module) inside the library."""
  known, found = modules(root), set()
  for name, path in known.items():
    for other in imported(ast.parse(path.read_text())):
      while other and other not in known:
        other = other.rpartition(".")[0]
      if other and other != name:
        found.add((name, other))
  return found


@contextlib.contextmanager
def programs() -> Iterator[list[str]]:
  """The names of the programs that are compiled in the block."""
  import jax

  names: list[str] = []

  def listen(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def one_forget() -> Iterator[tuple[str, int, int]]:
  """What is asked of `mnemonic_jax.forget`, how often the model is traced, programs compiled."""
  import jax
  import jax.numpy as jnp

  import mnemonic_jax as mj

  codes = jax.random.normal(jax.random.key(0), (10, 1, 16))
  params = {"hidden": jax.random.normal(jax.random.key(1), (16, 32)), "output": jnp.ones((32, 10))}
  calls: list[int] = []

  def model(shift: jax.Array, params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    calls.append(1)
    return jnp.tanh((inputs - shift) @ params["hidden"]) @ params["output"]

  carried = lambda value: jax.tree_util.Partial(model, jnp.full(16, value))
  method, other = mj.Perturbation(1e-3, 10.0), mj.Perturbation(1e-2, 5.0)
  asked = (
    ("cold", carried(0.1), [0], method),
    ("another class, another strength", carried(0.1), [2, 3], other),
    ("another state of the same model", carried(0.2), [0], method),
    ("a new closure over the same model", lambda p, x: model(jnp.zeros(16), p, x), [0], method),
  )
  jax.block_until_ready((codes, params, [function for _, function, *_ in asked[:3]]))
  for what, function, classes, chosen in asked:
    calls.clear()
    with programs() as names:
      mj.forget(function, params, codes, classes, method=chosen)
    yield what, len(calls), len(names)


def main(root: pathlib.Path) -> None:
  """Print the counts as Markdown."""
  print("| folder | Python files | lines | lines beyond 100 columns |\n|---|---|---|---|")
  for folder in FOLDERS:
    texts = [path.read_text().splitlines() for path in (root / folder).rglob("*.py")]
    long = sum(len(line) > WIDTH for lines in texts for line in lines)
    print(f"| {folder} | {len(texts)} | {sum(map(len, texts))} | {long} |")
  found, stage = arrows(root), lambda name: [*name.split("."), ""][1]
  pairs = [(stage(one), stage(other)) for one, other in found]
  inside = sum(one == other for one, other in pairs)
  between = {pair for pair in pairs if pair[0] != pair[1] and all(pair)}
  stages = {stage(name) for name in modules(root)} - {""}
  print(f"\narrows between files: {len(found)}, {inside} of them inside one stage")
  print(f"stages: {len(stages)}, arrows between them: {len(between)}")
  if root.resolve() == pathlib.Path(__file__).parent.parent.resolve():
    print("\n| one forget | traces of the model | programs |\n|---|---|---|")
    for row in one_forget():
      print("| {} | {} | {} |".format(*row))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else pathlib.Path(__file__).parent.parent)
