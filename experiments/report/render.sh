#!/bin/sh
# The reports and the comparison anew, from the result.json, plan.yaml and evidence.json beside this.
set -e
cd "$(dirname "$0")"
for model in qwen3moe-32m mixtral-27m; do
  ${PYTHON:-python} -m moecule report $model/heapr_mc -o $model.html
done
# the first is what the others are set against
${PYTHON:-python} -m moecule compare qwen3moe-32m/mc $(ls -d qwen3moe-32m/* | grep -v "/mc$") -o compare.html
