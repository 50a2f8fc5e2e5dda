#!/usr/bin/env bash
# The GPU check: in one call, whether the project works on this machine's GPU and how fast. Run it in the repository's root:
#   bash benchmarks/gpu_session.sh                all parts, within BUDGET seconds (530 by default)
#   ONLY="tests step" bash benchmarks/gpu_session.sh    these parts alone, of: e2e tests train step annotate decode kernels
#   TINY=1 BUDGET=900 bash benchmarks/gpu_session.sh    the same code with tiny models, which a CPU runs in minutes
# A part that fails or runs out of time stops nothing. Results: $OUT/results.json, $OUT/*.log, $OUT/trace_*.json.gz; a table of
# them is printed at the end. PY is the Python (python3 by default), WORK the folder of what is thrown away by the next call.
# A folder wheels/ beside this script is installed into SITE first, for a machine that has torch and no network.
set -u
START=$(date +%s)
BUDGET=${BUDGET:-530}
TINY=${TINY:-}
ONLY=${ONLY:-}
PY=${PY:-python3}
WORK=${WORK:-${TMPDIR:-/tmp}/gpu_session}
OUT=${OUT:-$WORK/out}
SITE=${SITE:-$WORK/site}
DEV=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$PWD
PARTS=("$PY" -P "$DEV/gpu_parts.py") # -P: beside it lie modules with names such as checkpoint
[ -d "$ROOT/steerlm_megatron" ] || { echo "run this in the repository's root" >&2; exit 2; }

mkdir -p "$OUT" "$WORK"
# Compiled kernels of an earlier call go too, so that the seconds of a first step mean the same every time.
rm -rf "$WORK"/{run,sft,ds,inductor,triton,extensions}
rm -f "$WORK"/*.json "$WORK"/parts.tsv "$WORK"/junit.xml "$OUT"/{env,tests,e2e,e2e2,bench,step,decode,tests_and_env}.log "$OUT"/results.json
export OUT PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 DS_BUILD_OPS=0 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor} TORCHINDUCTOR_COMPILE_THREADS=4
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton} TORCH_EXTENSIONS_DIR=$WORK/extensions
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
[ -n "$TINY" ] && export OMP_NUM_THREADS=1

left() { echo $((BUDGET - ($(date +%s) - START))); }
say() { echo "[$(($(date +%s) - START)) s] $*"; }
wanted() { [ -z "$ONLY" ] || [[ " env $ONLY " == *" $1 "* ]]; }

# part NAME LIMIT NEED LOG COMMAND...: runs at most LIMIT seconds, and ends 15 before the budget does; with fewer than NEED it is
# skipped. ONLY has the first word of NAME (up to an underscore). {until} in the command becomes the time (seconds since 1970)
# at which the part should end by itself, so that what it has measured by then is printed.
part() {
  local name=$1 limit=$2 need=$3 log=$4 begin rest rc
  shift 4
  wanted "${name%%_*}" || return 0
  [ -n "$TINY" ] && limit=$((limit * 3))
  begin=$(date +%s)
  rest=$(($(left) - 15))
  [ "$rest" -lt "$limit" ] && limit=$rest
  if [ "$limit" -lt "$need" ]; then
    say "$name: skipped, $rest s left"
    printf '%s\t99\t0\n' "$name" >>"$WORK/parts.tsv"
    return 0
  fi
  say "$name: at most $limit s"
  local command=("${@//\{until\}/$((begin + limit - 6))}")
  echo "##### $name: ${command[*]}" >>"$OUT/$log"
  timeout -k 5 "$limit" "${command[@]}" >>"$OUT/$log" 2>&1
  rc=$?
  printf '%s\t%s\t%s\n' "$name" "$rc" "$(($(date +%s) - begin))" >>"$WORK/parts.tsv"
  say "$name: rc $rc"
  [ $rc -ne 0 ] && tail -n 8 "$OUT/$log" | cut -c1-300
  return 0
}

# ---- what the machine lacks, and what it is
export PYTHONPATH=$ROOT
shopt -s nullglob
wheels=("$DEV"/wheels/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
  "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "${wheels[@]}" 2>&1 | grep -v -i warning
  export PYTHONPATH=$SITE:$ROOT
  installed=("$SITE"/*.dist-info)
  say "wheels: ${#installed[@]} of ${#wheels[@]} installed"
fi
shopt -u nullglob
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
SIZE=(${TINY:+--tiny})
part env 60 20 env.log "${PARTS[@]}" env --json "$WORK/env.json" "${SIZE[@]}"

# ---- A: does it work? The tests, and beside them whole commands in processes of their own (nothing is timed here).
E2E=(experiment=quickstart data.demo_conversations=2000 bootstrap.prompts=64 evaluate.max_prompts=12)
if [ -n "$TINY" ]; then
  E2E=(experiment=quickstart data.demo_conversations=150 pipeline.base.train.steps=2 pipeline.train_ap.train.steps=2
    pipeline.sft.train.steps=2 pipeline.acsft.train.steps=2 pipeline.bootstrapped.train.steps=1 bootstrap.prompts=16
    evaluate.max_prompts=1 "evaluate.levels=[0,4]"
    sampling.max_tokens=128 sampling.temperature=9 sampling.top_k=0) # so that a barely trained model ends some responses
else
  E2E+=(engine.precision=bf16)
fi
part e2e_run 155 40 e2e.log "$PY" -m steerlm_megatron run "${E2E[@]}" run_dir="$WORK/run" &
# shellcheck disable=SC2016 # the inner bash expands these
part e2e_train_deepspeed 155 40 e2e2.log bash -c '
  train=("$0" -m steerlm_megatron train_sft experiment=quickstart data.demo_conversations=200 train.steps=4)
  "${train[@]}" train.save_every_steps=2 run_dir="$1/sft" && "${train[@]}" engine=deepspeed run_dir="$1/ds"' "$PY" "$WORK" &
part tests 155 30 tests.log "$PY" -m pytest -m gpu tests/gpu -ra --tb=short --durations=16 -p no:cacheprovider --junitxml="$WORK/junit.xml"
wait
[ -e "$OUT/e2e2.log" ] && cat "$OUT/e2e2.log" >>"$OUT/e2e.log" && rm "$OUT/e2e2.log"

# ---- B: how fast is it? One part after the other.
if [ -n "$TINY" ]; then
  TRAIN=(--shape tiny --dtype fp32 --tokens 1000 --row-tokens 256 --rounds 2 --vocab 512)
  ANNOTATE=(--shape tiny --dtype fp32 --tokens 1500 --longest 512 --rounds 2 --vocab 512 --slots 512 1024)
else
  TRAIN=(--shape 1b --dtype bf16 --tokens 64500 --row-tokens 4096 --rounds 7 --vocab 32000)
  ANNOTATE=(--shape 1b --dtype bf16 --tokens 131072 --longest 4096 --rounds 7 --vocab 32000 --slots 4096 16384 65536)
fi
measure() { # NAME LIMIT NEED LOG PART ARGUMENTS...: a part of gpu_parts.py
  part "$1" "$2" "$3" "$4" "${PARTS[@]}" "$5" --json "$WORK/$1.json" --until '{until}' "${SIZE[@]}" "${@:6}"
}
measure train_1b 130 45 bench.log train -- "${TRAIN[@]}" --micro-rows 2
if [ -z "$TINY" ] && wanted train && ! grep -q 'tokens/s' "$WORK/train_1b.json" 2>/dev/null; then # three peers may be too many for its memory
  measure train_1b_small 70 40 bench.log train -- "${TRAIN[@]}" --micro-rows 1 --peer sorted
fi
measure train_1b_ap 45 30 bench.log train -- "${TRAIN[@]}" --task ap --micro-rows 2
measure step 95 40 step.log step
measure annotate 60 30 bench.log annotate -- "${ANNOTATE[@]}"
measure decode 100 40 decode.log decode
measure kernels 70 25 step.log kernels

cat "$OUT/env.log" "$OUT/tests.log" >"$OUT/tests_and_env.log" 2>/dev/null
rm -f "$OUT/env.log" "$OUT/tests.log"
"${PARTS[@]}" summary --json "$OUT/results.json" --work "$WORK" 2>&1 | cut -c1-420
say "done; files: $(ls "$OUT" | tr '\n' ' ')"
