#!/usr/bin/env bash
# Prints a Python 3.11 or 3.12 that really runs and can make virtual environments; exit code 2 and a remedy when there is none.
# A name on PATH is not enough: a pyenv shim exists for versions that are not active, and fails when it is called.
set -u
probe='import sys, ensurepip, venv; print(sys.executable) if (3, 11) <= sys.version_info[:2] <= (3, 12) else sys.exit(1)'
candidates=("$@")
[ $# -gt 0 ] || candidates=(python3.11 python3.12 python3 python)
for candidate in "${candidates[@]}"; do
  if found="$("$candidate" -c "$probe" 2>/dev/null)"; then
    printf '%s\n' "$found"
    exit 0
  fi
done
echo "no Python 3.11 or 3.12 with venv among: ${candidates[*]}. Install one (Debian and Ubuntu: apt-get install python3 python3-venv)" \
  "or name it: make PYTHON=/path/to/python3.11" >&2
exit 2
