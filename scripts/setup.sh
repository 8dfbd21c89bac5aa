#!/usr/bin/env bash
# Makes or refreshes .venv for this checkout. Does nothing when pyproject.toml has not changed since the last run.
#   scripts/setup.sh [run|dev]     run: what serving needs; dev: also what tests and benchmarks need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
want=${1:-dev}
py=${PYTHON:-python3}
stamp=.venv/.alchemist-$want
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt scripts/setup.sh ]; then exit 0; fi

"$py" - <<'PY' || { echo "setup: Python 3.11 or 3.12 is needed (set PYTHON=/path/to/python3.11)" >&2; exit 1; }
import sys
sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))
PY
[ -x .venv/bin/python ] || "$py" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
uv=.venv/bin/uv
export VIRTUAL_ENV=$PWD/.venv

if .venv/bin/python -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then
  extra=cuda; args=()
else
  extra=cpu
  overrides=$(mktemp); trap 'rm -f "$overrides"' EXIT
  .venv/bin/python - >"$overrides" <<'PY'
import tomllib
table = tomllib.load(open("pyproject.toml", "rb"))["tool"]["alchemist"]["cpu-overrides"]
print(*table["pin"], *(f"{name} ; sys_platform == 'never'" for name in table["drop"]), sep="\n")
PY
  args=(--override "$overrides")
  # A folder of wheels that pip is configured with wins (uv does not read pip's configuration);
  # otherwise uv takes torch's CPU builds from their usual place.
  links=$("$py" -m pip config get global.find-links 2>/dev/null || true)
  if [ -n "$links" ]; then export UV_FIND_LINKS=$links; else args+=(--torch-backend cpu); fi
fi
[ "$want" = dev ] && extra=$extra,dev
"$uv" pip install --quiet --compile-bytecode "${args[@]}" -e ".[$extra]"
touch "$stamp"
echo "setup: .venv is ready ($extra)"
