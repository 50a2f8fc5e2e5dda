#!/usr/bin/env bash
# install.sh VENV [PYTHON]: makes the virtual environment VENV and installs the project into it, editable, with what tests and
# documentation need. The version of its Python chooses the constraints. PYTHON is a name or path; without it an environment
# that is there is kept, and a new one is made with the Python that find_python.sh prefers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1
asked=${2:-}
python="$venv/bin/python"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

wanted=""
[ -z "$asked" ] || wanted="$(bash scripts/find_python.sh "$asked")"
reason=""
if [ ! -x "$python" ] || ! "$python" -c 'import pip' >/dev/null 2>&1; then
  reason="creating $venv"
elif [ -n "$wanted" ] && [ "$(version_of "$python")" != "$(version_of "$wanted")" ]; then
  reason="$venv has Python $(version_of "$python"), PYTHON=$asked is $(version_of "$wanted"): creating it anew"
fi
if [ -n "$reason" ]; then
  [ -n "$wanted" ] || wanted="$(bash scripts/find_python.sh)"
  echo "$reason with $wanted"
  "$wanted" -m venv --clear "$venv"
fi

constraints="constraints-$(version_of "$python").txt"
if [ ! -f "$constraints" ]; then
  echo "$venv has Python $(version_of "$python"), for which there is no $constraints: remove $venv, or name a Python 3.12 or 3.11" \
    "(make PYTHON=python3.12)" >&2
  exit 2
fi
echo "installing into $venv by $constraints (some minutes the first time)"
pip=("$python" -m pip --disable-pip-version-check --no-input install -qq -c "$constraints")
# Torch goes first and by its exact version: with it in place, no other package can pull in a different build of it.
"${pip[@]}" "$(grep -E '^torch==[0-9.]+$' "$constraints")" setuptools
# DS_BUILD_OPS=0: DeepSpeed compiles nothing now; what it needs, it compiles when it is used.
DS_BUILD_OPS=0 "${pip[@]}" -e '.[dev,docs]'
