"""Programs kept between commands: found again, never trusted blindly, and never in the way."""

from __future__ import annotations

import os
import pathlib

import jax
import numpy as np
import pytest
from running import command, environment, snapshot

from mnemonic_jax.cli import compilation_cache
from mnemonic_jax.data import prepared
from mnemonic_jax.data.split import Split

pytest_plugins = ["run_fixtures"]


def with_cache(root, **more):
  return {"env": environment() | {"XDG_CACHE_HOME": str(root)} | more}


def programs(root):
  return {name: digest for name, digest in snapshot(root).items() if name.endswith("-cache")}


@pytest.fixture
def config():
  """jax's settings and the warnings hook as they were."""
  import warnings

  names = (
    "compilation_cache_dir",
    "persistent_cache_min_compile_time_secs",
    "persistent_cache_min_entry_size_bytes",
  )
  before = {name: getattr(jax.config, f"jax_{name}") for name in names}
  show = warnings.showwarning
  yield
  warnings.showwarning = show
  for name, value in before.items():
    jax.config.update(f"jax_{name}", value)


def test_the_second_request_of_a_kind_compiles_nothing(tmp_path, trained):
  run, root = trained, tmp_path / "cache"
  first = command("forget", run, "--classes", 0, "--json", **with_cache(root)).json
  kept = programs(root)
  assert len(kept) >= 2
  second = command("forget", run, "--classes", 0, "--json", **with_cache(root)).json
  assert programs(root) == kept
  assert second["params_sha256_after"] == first["params_sha256_after"]


@pytest.mark.long
def test_programs_cut_short_by_a_kill_are_made_again_without_a_word(tmp_path, trained):
  run, root = trained, tmp_path / "cache"
  first = command("forget", run, "--classes", 0, "--json", **with_cache(root))
  for path in root.rglob("*-cache"):
    path.write_bytes(path.read_bytes()[:100])
  again = command("forget", run, "--classes", 0, "--json", **with_cache(root))
  assert again.json["params_sha256_after"] == first.json["params_sha256_after"]
  assert "Error" not in again.err and "warn" not in again.err.lower()
  command("forget", run, "--classes", 0, "--json", **with_cache(root))
  sizes = [path.stat().st_size for path in root.rglob("*-cache")]
  assert sizes and min(sizes) > 100


@pytest.mark.long
def test_a_cache_folder_that_cannot_be_made_is_done_without(tmp_path, trained):
  (tmp_path / "file").write_text("")
  done = command("forget", trained, "--classes", 0, "--json", **with_cache(tmp_path / "file"))
  assert done.json["classes"] == [0]
  assert "cache" not in done.err


def test_a_user_without_a_home_has_no_cache(config, monkeypatch, tmp_path):
  def nowhere():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(pathlib.Path, "home", nowhere)
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.enable()
  assert jax.config.jax_compilation_cache_dir is None
  split = Split(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32))
  assert prepared.kept(tmp_path, "set-train", lambda: split) is split
  prepared.drop_orphans()


def test_the_users_own_cache_folder_and_switch_are_respected(tmp_path, config, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
  compilation_cache.enable()
  assert (
    jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    and not (tmp_path / "ours").exists()
  )
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", False, raising=False)
  compilation_cache.enable()
  assert jax.config.jax_compilation_cache_dir is None and not (tmp_path / "ours").exists()


def test_the_folder_is_private_and_that_of_another_user_is_not_used(tmp_path, config, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  owner = os.getuid()
  monkeypatch.setattr(os, "getuid", lambda: owner + 1)
  compilation_cache.enable()
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.undo()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compilation_cache.enable()
  folder = next((tmp_path / "mnemonic_jax").iterdir())
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert folder.stat().st_mode & 0o077 == 0


def test_the_oldest_programs_go_first(tmp_path, monkeypatch):
  monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 250)
  for age, name in enumerate(("new", "middle", "old")):
    (tmp_path / name).write_bytes(b"x" * 100)
    os.utime(tmp_path / name, (1000 - age, 1000 - age))
  compilation_cache._prune(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"new", "middle"}
