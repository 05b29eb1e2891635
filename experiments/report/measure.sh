#!/bin/sh
# Makes the models, results, reports and the comparison of this folder, in the folder WORK.
#     experiments/report/measure.sh SHARED WORK      half an hour on two cores, a model on each
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
  OMP_NUM_THREADS=1 python -m moecule compress --quiet "$model" -o "$model-out/$name" "$@" --samples 32 \
    --data calibration.jsonl $text
  mkdir -p "$here/$model/$name"
  cp "$model-out/$name/result.json" "$model-out/$name/plan.yaml" "$model-out/$name/evidence.json" \
    "$here/$model/$name"
}

size_of() { # the bytes that mc took
  python -c "import json; print(json.load(open('$here/$1/mc/result.json'))['size_bytes'])"
}

best() { # model: mc at 2.5 bits, and the best of as many bytes
  one "$1" mc --bits 2.5
  one "$1" heapr_mc --recipe heapr_mc --size "$(size_of "$1")B"
}

others() {
  one qwen3moe-32m uniform --recipe uniform --bits 3
  one qwen3moe-32m uniform_rtn --recipe uniform_rtn --bits 3
  one qwen3moe-32m mc_paper --recipe mc_paper --bits 2.5
  one qwen3moe-32m frequency --recipe frequency --bits 2.5
  one qwen3moe-32m reap --recipe reap --drop 25%
  for name in ean easy_ep; do # one calibration serves every recipe that drops experts
    mkdir -p qwen3moe-32m-out/$name
    cp -r qwen3moe-32m-out/reap/stats qwen3moe-32m-out/$name
    one qwen3moe-32m $name --recipe $name --drop 25%
  done
}

(best mixtral-27m && best qwen3moe-32m) &
others
wait
"$here/render.sh"
