#!/usr/bin/env bash
# Fetch POPE's questions about COCO and their pictures into data/pope. Run again after an interruption: what is there is left alone.
# The addresses could not be tried where this was written (no network): POPE_URL and POPE_PICTURES_URL name other places.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: data/download_pope.sh random|popular|adversarial|pictures|all ...

  random, popular, adversarial   3,000 questions each, JSON lines   -> data/pope/coco_pope_<name>.json
  pictures                       those that the lists there name (500, about 80 MB), one by one from COCO's val2014
                                                                    -> data/pope/COCO_val2014_<id>.jpg
  all                            the three lists and their pictures

Every script that takes a question list reads them: --question_file data/pope/coco_pope_random.json.
What is there already is left alone. Needs wget or curl. POPE_URL, POPE_PICTURES_URL: other places of the lists, of the pictures.
TEXT
}

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

download() { # address name -> $part/name
    if command -v wget > /dev/null; then
        wget --quiet --directory-prefix="$part" "$1/$2"
    else
        curl --silent --show-error --fail --location --output "$part/$2" "$1/$2"
    fi
}

fetch() { # address name: downloaded apart, so that what is in data/pope is whole
    rm -f "$part/$2"
    mkdir -p "$part" || fail "$part cannot be made"
    download "$1" "$2" || fail "$1/$2 could not be downloaded; run the same command again to go on"
}

list() { # random, popular or adversarial
    local name="coco_pope_$1.json"
    if [ -e "$pope/$name" ]; then
        echo "$pope/$name is there; nothing to do"
        return
    fi
    fetch "$lists" "$name"
    grep -q '"text"' "$part/$name" && grep -q '"label"' "$part/$name" ||
        fail "$lists/$name is not POPE's list of questions; see $part/$name"
    mv "$part/$name" "$pope/$name"
    echo "$pope/$name is ready"
}

pictures() {
    local name missing=0
    cat "$pope"/coco_pope_*.json > /dev/null 2>&1 || fail "$pope has no list yet; run data/download_pope.sh random pictures"
    for name in $(grep -oh 'COCO_val2014_[0-9]*\.jpg' "$pope"/coco_pope_*.json | sort -u); do
        [ -e "$pope/$name" ] && continue
        fetch "$photos" "$name"
        [ -s "$part/$name" ] || fail "$photos/$name is empty; run the same command again to go on"
        mv "$part/$name" "$pope/$name"
        missing=$((missing + 1))
    done
    echo "$pope: $missing pictures fetched"
}

case "${1:-}" in -h | --help) usage; exit 0 ;; "") usage >&2; fail "say what to fetch: random, popular, adversarial, pictures or all" 2 ;; esac
parts=()
for name in "$@"; do
    case "$name" in
        random | popular | adversarial | pictures) parts+=("$name") ;;
        all) parts+=(random popular adversarial pictures) ;;
        *) fail "'$name' is not one of random, popular, adversarial, pictures, all" 2 ;;
    esac
done
pope="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/pope"
part="$pope/.downloading"
lists="${POPE_URL:-https://raw.githubusercontent.com/RUCAIBox/POPE/main/output/coco}"
photos="${POPE_PICTURES_URL:-http://images.cocodataset.org/val2014}"
command -v wget > /dev/null || command -v curl > /dev/null || fail "neither wget nor curl is installed; on Debian or Ubuntu: apt-get install wget" 2
for name in "${parts[@]}"; do
    case "$name" in
        pictures) pictures ;;
        *) list "$name" ;;
    esac
done
rmdir "$part" 2> /dev/null || true
