#!/usr/bin/env bash
# Install plainly on the newest Python at hand (3.13, else 3.12) and run the doctests and the demo there; skips where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
newest() {
  for version in 3.13 3.12; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python3; do
      if "$candidate" -c 'import venv' >/dev/null 2>&1; then
        echo "$candidate"
        return
      fi
    done
  done
}
python=$(newest)
if [ -z "$python" ]; then
  echo "smoke: no Python 3.12 or 3.13 here; skipped"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check . pytest
"$folder/venv/bin/python" -c 'import sys, jax; print("smoke:", sys.version.split()[0], "jax", jax.__version__)'
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider tests/test_docs.py
(cd "$folder" && venv/bin/mnemonic run digits --out run --json >/dev/null && venv/bin/mnemonic evaluate run)
