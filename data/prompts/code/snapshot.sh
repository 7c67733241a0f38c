#!/bin/sh
# Keep dated copies of a folder: unchanged files are shared between copies as hard links.
# usage: snapshot.sh SOURCE TARGET [KEEP]

set -eu

usage() {
    echo "usage: $0 SOURCE TARGET [KEEP]" >&2
    exit 2
}

[ $# -ge 2 ] || usage
source_dir=${1%/}
target_dir=${2%/}
keep=${3:-7}

case $keep in
    ''|*[!0-9]*) echo "KEEP must be a number, got '$keep'" >&2; usage ;;
esac
[ -d "$source_dir" ] || { echo "no folder $source_dir" >&2; exit 1; }
mkdir -p "$target_dir"

stamp=$(date +%Y-%m-%dT%H%M%S)
unfinished="$target_dir/.unfinished"
lock="$target_dir/.lock"

if ! mkdir "$lock" 2>/dev/null; then
    echo "another snapshot is running (remove $lock if that is not so)" >&2
    exit 1
fi
trap 'rm -rf "$lock" "$unfinished"' EXIT INT TERM

latest=$(ls -1 "$target_dir" | sort | tail -n 1)
rm -rf "$unfinished"
if [ -n "$latest" ]; then
    cp -al "$target_dir/$latest" "$unfinished"
else
    mkdir "$unfinished"
fi

# Replace what changed: remove first, so that the older copy keeps its own content.
( cd "$source_dir" && find . -type f ) | while IFS= read -r file; do
    if ! cmp -s "$source_dir/$file" "$unfinished/$file"; then
        mkdir -p "$unfinished/$(dirname "$file")"
        rm -f "$unfinished/$file"
        cp -p "$source_dir/$file" "$unfinished/$file"
        echo "copied ${file#./}"
    fi
done

( cd "$unfinished" && find . -type f ) | while IFS= read -r file; do
    [ -e "$source_dir/$file" ] || rm -f "$unfinished/$file"
done

mv "$unfinished" "$target_dir/$stamp"

count=$(ls -1 "$target_dir" | wc -l)
ls -1 "$target_dir" | sort | while IFS= read -r old; do
    [ "$count" -gt "$keep" ] || break
    rm -rf "${target_dir:?}/$old"
    echo "forgot $old"
    count=$((count - 1))
done
