#!/bin/bash
# A command on this machine, as a job without SLURM: it comes back after exit code 75 and after a first fault, with the same
# history in run_dir/launch. A signal to this script stops it for good, after saving.
#   MAX_REQUEUES=3 bash launch/local.sh train_sft experiment=quickstart parallel.data=2 run_dir=runs/first
source "$(dirname "${BASH_SOURCE[0]}")/slurm/job.sh"
[ -n "${PYTHON:-}" ] || [ -x .venv/bin/python ] || PYTHON=python
# shellcheck disable=SC2034  # job.sh reads it
LAUNCH_ID=$(date +%Y%m%d-%H%M%S)-$$
while :; do
  steerlm_job "$@"
  [ "$decision" = requeue ] || exit "$code"
done
