#!/bin/sh
# Makes the models, results, reports and the comparison of this folder, in the folder WORK.
#     experiments/report/measure.sh SHARED WORK      about two hours on one busy core
set -e
shared=$(realpath "$1") here=$(realpath "$(dirname "$0")")
mkdir -p "$2/text" && cd "$2"
domains="prose techdoc python c maths multilingual"
text=
for d in $domains; do
  head -c 24000 "$shared/data/text/val/$d.txt" | iconv -c -f utf-8 -t utf-8 > "text/$d.txt"
  text="$text --text text/$d.txt"
done
xz -dc "$shared/data/text/train_sample.jsonl.xz" | head -3000 | python3 -c '
import json, sys
for line in sys.stdin:
    print(json.dumps({"text": json.loads(line)[1]}))' > calibration.jsonl
ln -sfn "$shared/models/qwen3moe-32m" qwen3moe-32m
ln -sfn "$shared/models/mixtral-27m" mixtral-27m

one() { # model, name, what is asked
  model=$1 name=$2
  shift 2
  OMP_NUM_THREADS=1 python -m moecule compress "$model" -o "$model-out/$name" "$@" --samples 32 \
    --data calibration.jsonl $text
  mkdir -p "$here/$model/$name"
  cp "$model-out/$name/result.json" "$model-out/$name/plan.yaml" "$model-out/$name/evidence.json" \
    "$here/$model/$name"
}

for model in qwen3moe-32m mixtral-27m; do
  one $model mc --bits 2.5
done
one qwen3moe-32m uniform_rtn --recipe uniform_rtn --bits 3
one qwen3moe-32m reap --recipe reap --drop 25%
one qwen3moe-32m uniform --recipe uniform --bits 3
one qwen3moe-32m mc_paper --recipe mc_paper --bits 2.5
one qwen3moe-32m frequency --recipe frequency --bits 2.5
for name in ean easy_ep; do # one calibration serves every recipe that drops experts
  mkdir -p qwen3moe-32m-out/$name
  cp -r qwen3moe-32m-out/reap/stats qwen3moe-32m-out/$name
  one qwen3moe-32m $name --recipe $name --drop 25%
done
"$here/render.sh"
