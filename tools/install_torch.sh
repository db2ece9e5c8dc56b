#!/bin/sh
# Installs the pinned torch into an environment: sh tools/install_torch.sh PYTHON [INDEX]
# On Linux, PyPI's torch is the CUDA build (gigabytes). Without an NVIDIA GPU that is waste, so this says so before it starts.
set -eu
python=$1
index=${2:-}

pip() { "$python" -m pip --disable-pip-version-check install --constraint constraints.txt "$@"; }

if [ -n "$index" ]; then
    echo "installing torch from $index ..."
    pip --quiet --index-url "$index" torch
    exit 0
fi
chosen=$(pip --dry-run --no-deps torch 2>/dev/null | sed -n 's/^Would install //p')
if [ -z "$chosen" ]; then
    exit 0 # the pinned version is there already
fi
if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] && [ "${chosen%+cpu}" = "$chosen" ]; then
    cat <<'TEXT'
NOTE: pip is about to fetch the CUDA build of torch: gigabytes, and this machine shows no NVIDIA GPU.
      For the small CPU build press Ctrl-C, open "get started" at pytorch.org, choose Linux, Pip, Python, CPU, and give
      the address that it shows after --index-url:   make run TORCH_INDEX=ADDRESS
TEXT
    pip torch
else
    echo "installing $chosen ..."
    pip --quiet --quiet torch
fi
