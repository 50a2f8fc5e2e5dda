#!/usr/bin/env bash
# smollm2.sh PYTHON OASST RANKS [key=value ...]: makes SmolLM2-135M-Instruct, runs the recipe smollm2_oasst on OASST (a file, or
# several with blanks between them), and exports the two models that it trained as Hugging Face folders. What is there already is
# not done again. The other arguments are keys of `steerlm run`.
set -euo pipefail
python=$1 oasst=$2 ranks=$3
shift 3
base=runs/SmolLM2-135M-Instruct run=runs/smollm2

where="the OASST release is on the Hugging Face hub, OpenAssistant/oasst1: 2023-04-12_oasst_ready.trees.jsonl.gz (or .messages.jsonl.gz)
a tree is a line, so a part of it is a corpus too: zcat 2023-04-12_oasst_ready.trees.jsonl.gz | head -n 450 > oasst.jsonl"
if [ -z "$oasst" ]; then
  printf 'say which corpus: make smollm2 OASST=FILE\n%s\n' "$where" >&2
  exit 2
fi
files=("$oasst")
[ -e "$oasst" ] || read -ra files <<<"$oasst"
for file in "${files[@]}"; do
  if [ ! -e "$file" ]; then
    printf 'OASST=%s: no such file\n%s\n' "$file" "$where" >&2
    exit 2
  fi
done
input="$(printf ",'%s'" "${files[@]}")"

# Without instructions for bf16 a CPU takes several times as long in it as in float32.
precision=fp32
if command -v nvidia-smi >/dev/null 2>&1 || grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi

steerlm=("$python" -m steerlm_megatron)
"$python" scripts/fetch_smollm2.py "$base"
"${steerlm[@]}" run experiment=smollm2_oasst init_from="$base" data.input="[${input#,}]" run_dir="$run" parallel.data="$ranks" \
  engine.precision="$precision" "$@"
for model in 10-bootstrapped:model 03-train_ap:predictor; do
  folder="$run/hf/${model#*:}"
  "${steerlm[@]}" export checkpoint="$run/${model%%:*}" output="$folder" export.format=hf export.evaluation="$run/11-evaluate" \
    run_dir="$run/export-${model#*:}" overwrite=true
done
printf 'report: %s\nits models as Hugging Face folders: %s\n' "$run/12-report/report.html" "$run/hf/model $run/hf/predictor"
