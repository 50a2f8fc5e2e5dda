#!/bin/bash
# A command on this machine, as a job without SLURM: it comes back after exit code 75 and after a first fault, with the same
# history in run_dir/launch.
#   MAX_REQUEUES=3 bash launch/local.sh train_sft experiment=quickstart parallel.data=2 run_dir=runs/first
cd "${STEERLM_HOME:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 2
source launch/slurm/job.sh
LAUNCH_ID=$(date +%Y%m%d-%H%M%S)-$$
while :; do
  steerlm_job "$@"
  [ "$decision" = requeue ] || exit "$code"
done
