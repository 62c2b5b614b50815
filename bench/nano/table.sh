#!/bin/sh
# The table of docs/keye-nano.md: how well keye-nano answers, after each stage and in each way of asking.
#
#   bench/nano/table.sh MODEL RUNS OUT [COUNT]
#
# MODEL is the finished model (what `keye train export` wrote), RUNS the folder of `keye train run`, OUT where clips, reports and the
# tables go, COUNT the questions of each of the 15 kinds (50). KEYE names the binary, STAGES those stages to measure that RUNS has. A report
# that is there is not measured again: remove those of another version, which `keye eval compare` refuses. `bench/nano/record.py` puts the
# tables into the docs.
set -eu
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 runs=$2 out=$3 count=${4:-50}
keye=${KEYE:-keye}
mkdir -p "$out/stages" "$out/ablations"

# measure REPORT MODEL [OPTION...]
measure() {
    report=$1 of=$2
    shift 2
    [ -s "$report" ] && return
    "$keye" eval world -m "$of" --count "$count" --clips "$out/clips" --json "$@" > "$report.partial"
    mv "$report.partial" "$report"
}

for format in int8 int4; do
    [ -d "$out/$format" ] || "$keye" quantize "$model" --to "$format" -o "$out/$format" > /dev/null
done

a=$out/ablations
measure "$a/keye-nano.json" "$model"
measure "$a/text-only.json" "$model" --text-only
measure "$a/uniform.json" "$model" --frames uniform
measure "$a/square.json" "$model" --square 112
measure "$a/int8.json" "$out/int8"
measure "$a/int4.json" "$out/int4"
stages=
for stage in ${STAGES:-projector captions-3 anneal captions-4 clips sft sft-2 sft-3 sft-4 sft-5 sft-6 sft-7}; do
    [ -d "$runs/$stage/model" ] || continue
    measure "$out/stages/$stage.json" "$runs/$stage/model"
    stages="$stages $out/stages/$stage.json"
done

{
    "$keye" eval compare "$a/keye-nano.json" "$a/text-only.json" "$a/uniform.json" "$a/square.json" "$a/int8.json" \
        "$a/int4.json"
    echo
    # shellcheck disable=SC2086 # a list of files
    [ -z "$stages" ] || "$keye" eval compare $stages
} > "$out/tables.md"
"$keye" eval compare "$a/keye-nano.json" "$a/text-only.json" --svg "$out/accuracy.svg" > /dev/null
cat "$out/tables.md"
