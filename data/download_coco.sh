#!/usr/bin/env bash
# Fetch MS COCO 2017 into data/COCO/{val2017,train2017,annotations}. Run again after an interruption: the download goes on where it stopped.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: data/download_coco.sh val|train|annotations|all ...

  val          5,000 pictures, 0.8 GB                                  -> data/COCO/val2017
  train        118,287 pictures, 19 GB (38 GB while it is unpacked)    -> data/COCO/train2017
  annotations  captions and instances of both parts, 0.25 GB           -> data/COCO/annotations
  all          the three of them

What is there already is left alone. Needs unzip, and wget or curl.
TEXT
}

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

download() { # url
    if command -v wget > /dev/null; then
        wget --continue --directory-prefix="$coco" "$1"
    else
        curl --fail --location --continue-at - --output "$coco/${1##*/}" "$1"
    fi
}

fetch() { # folder url
    local folder=$1 url=$2
    local zip="$coco/${url##*/}" unpacking="$coco/.unpacking-$folder"
    if [ -e "$coco/$folder" ]; then
        echo "$coco/$folder is there; nothing to do"
        return
    fi
    mkdir -p "$coco" || fail "$coco cannot be made"
    # a finished archive makes some servers refuse to continue it: what counts is whether it is whole
    download "$url" || unzip -tqq "$zip" > /dev/null 2>&1 || fail "$url could not be downloaded; run the same command again to go on"
    rm -rf "$unpacking"
    unzip -q "$zip" -d "$unpacking" || fail "$zip could not be unpacked: the disk is full, or the file is damaged (then delete it and run again)"
    [ -d "$unpacking/$folder" ] || fail "$zip holds no folder $folder; delete it and run again"
    mv "$unpacking/$folder" "$coco/$folder"
    rm -rf "$unpacking" "$zip"
    echo "$coco/$folder is ready"
}

coco="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/COCO"
case "${1:-}" in -h | --help) usage; exit 0 ;; "") usage >&2; fail "say what to fetch: val, train, annotations or all" 2 ;; esac
parts=()
for part in "$@"; do
    case "$part" in
        val | train | annotations) parts+=("$part") ;;
        all) parts+=(annotations val train) ;;
        *) fail "'$part' is not one of val, train, annotations, all" 2 ;;
    esac
done
command -v unzip > /dev/null || fail "unzip is not installed; on Debian or Ubuntu: apt-get install unzip" 2
command -v wget > /dev/null || command -v curl > /dev/null || fail "neither wget nor curl is installed; on Debian or Ubuntu: apt-get install wget" 2
for part in "${parts[@]}"; do
    case "$part" in
        annotations) fetch annotations http://images.cocodataset.org/annotations/annotations_trainval2017.zip ;;
        *) fetch "${part}2017" "http://images.cocodataset.org/zips/${part}2017.zip" ;;
    esac
done
