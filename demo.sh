#!/usr/bin/env bash
# Installs what is missing on Debian or Ubuntu, builds keye and asks about the sample clip.
# Arguments are passed on to `keye ask`: ./demo.sh --json
set -euo pipefail
cd "$(dirname "$0")"

missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || missing+=(ffmpeg)
if ((${#missing[@]})); then
    echo "installing ${missing[*]}" >&2
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

cargo build --release --locked -p keye
exec cargo run --release --locked --quiet -p keye -- ask --model fixtures/keye-1_5-tiny/model --temperature 1 --seed 4 --max-tokens 48 "$@" \
    media/bikes.mp4 "What happens, and when?"
