#!/usr/bin/env bash
# Fetch EmbSpatial-Bench as a table and its boxes. Run again after an interruption: the download goes on where it stopped.
# The addresses could not be tried where this was written (no network): if one has moved, EMBSPATIAL_URL names another place with the same two files.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: data/download_embspatial.sh

  3,640 questions with their pictures, about 0.25 GB each file, from the hub's datasets
  -> data/EmbSpatial-Bench.tsv     the table of ch-min/EmbSpatial-Bench-tsv     (--data_path of swap_analysis.py)
  -> data/embspatial_bench.json    the records of Phineas476/EmbSpatial-Bench   (--bbox_file; as --data_path too)

What is there already is left alone. Needs wget or curl. EMBSPATIAL_URL: another place of the two files.
TEXT
}

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

download() { # address name -> $part/name
    mkdir -p "$part" || fail "$part cannot be made"
    if command -v wget > /dev/null; then
        wget --continue --directory-prefix="$part" "$1/$2"
    else
        curl --fail --location --continue-at - --output "$part/$2" "$1/$2"
    fi
}

fetch() { # name address word-in-it
    local name=$1 from="${EMBSPATIAL_URL:-$2}"
    if [ -e "$data/$name" ]; then
        echo "$data/$name is there; nothing to do"
        return
    fi
    # a finished file makes some servers refuse to continue it: what counts is whether its end is there
    download "$from" "$name" || ends "$part/$name" || fail "$from/$name could not be downloaded; run the same command again to go on"
    head -c 1000000 "$part/$name" | grep -c "$3" > /dev/null ||
        fail "$from/$name is not EmbSpatial-Bench's; see $part/$name, delete it and run again"
    mv "$part/$name" "$data/$name"
    echo "$data/$name is ready"
}

ends() { # file: a whole JSON list, or a last line that is complete
    [ -s "$1" ] || return 1
    case "$1" in
        *.json) [ "$(tail -c 3 "$1" | tr -d '[:space:]' | tail -c 1)" = "]" ] ;;
        *) [ "$(tail -c 1 "$1" | wc -l)" = 1 ] ;;
    esac
}

case "${1:-}" in -h | --help) usage; exit 0 ;; "") ;; *) usage >&2; fail "'$1': no arguments are wanted" 2 ;; esac
data="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
part="$data/.embspatial-downloading"
command -v wget > /dev/null || command -v curl > /dev/null || fail "neither wget nor curl is installed; on Debian or Ubuntu: apt-get install wget" 2
hub=https://huggingface.co/datasets
fetch EmbSpatial-Bench.tsv "$hub/ch-min/EmbSpatial-Bench-tsv/resolve/main" "question"
fetch embspatial_bench.json "$hub/Phineas476/EmbSpatial-Bench/resolve/main" '"question_id"'
rmdir "$part" 2> /dev/null || true
