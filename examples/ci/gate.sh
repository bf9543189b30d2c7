#!/usr/bin/env bash
# Convert a model, quantize it, and let it pass only when it is accurate and not slower.
#
#   gate.sh SOURCE CALIBRATION HELD_OUT OUT
#
# Exit codes are those of modelops: 0 passed, 1 a gate failed, 2 to 7 something else is wrong (see modelops --help).
# A speed that this machine is too noisy to judge (exit 3) is a warning, unless STRICT=1 is set.
# OUT receives the artifacts, and in OUT/reports a report of each step as JUnit XML, Markdown and annotations.
set -uo pipefail

source=$1 calibration=$2 held_out=$3 out=$4
mkdir -p "$out/reports"

# step NAME COMMAND...: run one command with its reports, and stop on a failure.
step() {
    local name=$1 code=0
    shift
    "$@" --report "junit=$out/reports/$name.xml" --report "markdown=$out/reports/$name.md" \
        --report "github=$out/reports/$name.github" || code=$?
    if [ "$code" = 3 ] && [ "$name" = bench ] && [ -z "${STRICT:-}" ]; then
        echo "warning: too noisy to judge the speed here" >&2
    elif [ "$code" != 0 ]; then
        exit "$code"
    fi
}

step convert modelops convert "$source" "$out/float"

# Accuracy is judged on labelled samples that calibration never saw. Where int8 does not pay, float goes on.
step quantize modelops quantize "$out/float" "$out/deploy" --data "$calibration" --eval "$held_out" \
    --max-drop 2% --if-slower keep-source --speed-budget "${BUDGET:-20s}"

# Both models are timed now, on this machine, by turns: a baseline of another day or machine proves nothing.
step bench modelops bench "$out/deploy" "$out/evidence" --against "$out/float" --data "$held_out" \
    --budget "${BUDGET:-60s}"

echo "passed: deploy $out/deploy"
