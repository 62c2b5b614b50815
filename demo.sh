#!/usr/bin/env bash
# Installs what is missing on Debian or Ubuntu, builds keye and asks the model inside it about two clips.
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
ask() {
    printf '\n$ keye ask %s "%s"\n' "$1" "$2" >&2
    cargo run --release --locked --quiet -p keye -- ask "${@:3}" "$1" "$2"
}
ask media/shapes-1.mp4 "Write a caption." "$@"
ask media/shapes-2.mp4 "From when to when is the large blue cross there?" "$@"
