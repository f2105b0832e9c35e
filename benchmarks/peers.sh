#!/usr/bin/env bash
# Makes one Python environment per peer tool, outside the repository, with pinned versions.
#
#   benchmarks/peers.sh DIR [llmcompressor] [gptqmodel] [autoround] [torchpruning] [llamacpp]      (the first two where none is named)
#
# An environment that is already complete is left alone. PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(dirname "$here")
if [ $# -lt 1 ]; then
    echo "usage: benchmarks/peers.sh DIR [llmcompressor] [gptqmodel] [autoround] [torchpruning] [llamacpp]" >&2
    exit 2
fi
root=$(realpath -m "$1")
shift
case "$root/" in
    "$repository"/*) echo "peers.sh: $root lies inside the repository; choose a folder outside it" >&2; exit 2 ;;
esac
[ $# -gt 0 ] || set -- llmcompressor gptqmodel

mkdir -p "$root"
torch_pin="torch==2.13.0" # the same torch for all tools: what is compared are the tools, not two builds of torch
for peer in "$@"; do
    pins="$here/peers/$peer.txt"
    if [ ! -f "$pins" ]; then
        echo "peers.sh: no pins for '$peer'; there are: $(cd "$here/peers" && ls ./*.txt | sed 's|^\./||; s|\.txt$||' | tr '\n' ' ')" >&2
        exit 2
    fi
    folder="$root/$peer"
    if [ -f "$folder/.ready" ] && cmp -s "$pins" "$folder/.ready"; then
        echo "peers.sh: $peer is ready in $folder"
        continue
    fi
    "${PYTHON:-python3}" -m venv "$folder"
    echo "$torch_pin" > "$folder/constraints.txt"
    if [ "$peer" != llamacpp ]; then
        nice -n 10 "$folder/bin/python" -m pip install -q -c "$folder/constraints.txt" "$torch_pin"
    fi
    nice -n 10 "$folder/bin/python" -m pip install -q -c "$folder/constraints.txt" -r "$pins"
    cp "$pins" "$folder/.ready"
    echo "peers.sh: $peer installed in $folder"
done
