#!/usr/bin/env bash
# Prints a Python 3.12 or else 3.11 that really runs and can make virtual environments; exit code 2 and a remedy when there is
# none. With arguments, only these names or paths are tried, in their order.
# 3.12 comes first because Megatron-Core after 0.16 needs it.
# A name on PATH is not enough: a pyenv shim exists for versions that are not active, and fails when it is called. The versions
# that pyenv has installed are therefore looked at behind their shims.
set -u
probe='import sys, ensurepip, venv; print(sys.executable) if (3, 11) <= sys.version_info[:2] <= (3, 12) else sys.exit(1)'
candidates=("$@")
[ $# -gt 0 ] || candidates=(python3.12 python3.11 python3 python)

# Where a candidate may be: under its own name, then in pyenv's versions of it, the newest first.
places() {
  printf '%s\n' "$1"
  if [[ $1 =~ ^python(3\.[0-9]+)$ ]]; then
    printf '%s\n' "${PYENV_ROOT:-${HOME:-/root}/.pyenv}/versions/${BASH_REMATCH[1]}".*/"bin/$1" | sort -rV
  fi
}

for candidate in "${candidates[@]}"; do
  while IFS= read -r place; do
    if found="$("$place" -c "$probe" 2>/dev/null </dev/null)"; then
      printf '%s\n' "$found"
      exit 0
    fi
  done < <(places "$candidate")
done
echo "no Python 3.12 or 3.11 with venv among: ${candidates[*]}. Install one (Debian and Ubuntu: apt-get install python3 python3-venv)" \
  "or name it: make PYTHON=/path/to/python3.12" >&2
exit 2
