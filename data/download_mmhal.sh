#!/usr/bin/env bash
# Fetch MMHal-Bench into data/mmhal/{response_template.json,images}. Run again after an interruption: the download goes on where it stopped.
# The addresses could not be tried where this was written (no network): if one has moved, MMHAL_URL names another place with the same two files.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: data/download_mmhal.sh

  96 questions and their pictures, about 0.2 GB, from the hub's dataset Shengcao1006/MMHal-Bench
  -> data/mmhal/response_template.json   list of {image_id, image_src, question, gt_answer, ...}
  -> data/mmhal/images                   the pictures under the last part of their image_src

What is there already is left alone. Needs unzip, and wget or curl. MMHAL_URL: another place of response_template.json and test_data.zip.
TEXT
}

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

download() { # name -> $part/name
    mkdir -p "$part" || fail "$part cannot be made"
    if command -v wget > /dev/null; then
        wget --continue --directory-prefix="$part" "$from/$1"
    else
        curl --fail --location --continue-at - --output "$part/$1" "$from/$1"
    fi
}

template() {
    local name=response_template.json
    if [ -e "$mmhal/$name" ]; then
        echo "$mmhal/$name is there; nothing to do"
        return
    fi
    rm -f "$part/$name" # small: always whole
    download "$name" || fail "$from/$name could not be downloaded; run the same command again to go on"
    grep -q '"image_src"' "$part/$name" && grep -q '"question"' "$part/$name" ||
        fail "$from/$name is not MMHal-Bench's list of questions; see $part/$name"
    mv "$part/$name" "$mmhal/$name"
    echo "$mmhal/$name is ready"
}

images() {
    local zip="$part/test_data.zip" unpacking="$mmhal/.unpacking" found
    if [ -e "$mmhal/images" ]; then
        echo "$mmhal/images is there; nothing to do"
        return
    fi
    # a finished archive makes some servers refuse to continue it: what counts is whether it is whole
    download test_data.zip || unzip -tqq "$zip" > /dev/null 2>&1 || fail "$from/test_data.zip could not be downloaded; run the same command again to go on"
    rm -rf "$unpacking"
    unzip -q "$zip" -d "$unpacking" || fail "$zip could not be unpacked: the disk is full, or the file is damaged (then delete it and run again)"
    found="$unpacking/images"
    [ -d "$found" ] || found="$unpacking/test_data/images"
    [ -d "$found" ] && [ -n "$(ls "$found")" ] || fail "$zip holds no pictures in a folder images; delete it and run again"
    mv "$found" "$mmhal/images"
    rm -rf "$unpacking" "$zip"
    echo "$mmhal/images is ready"
}

case "${1:-}" in -h | --help) usage; exit 0 ;; "") ;; *) usage >&2; fail "'$1': no arguments are wanted" 2 ;; esac
mmhal="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/mmhal"
part="$mmhal/.downloading"
from="${MMHAL_URL:-https://huggingface.co/datasets/Shengcao1006/MMHal-Bench/resolve/main}"
command -v unzip > /dev/null || fail "unzip is not installed; on Debian or Ubuntu: apt-get install unzip" 2
command -v wget > /dev/null || command -v curl > /dev/null || fail "neither wget nor curl is installed; on Debian or Ubuntu: apt-get install wget" 2
template
images
rmdir "$part" 2> /dev/null || true
