#!/usr/bin/env bash
# Train a small ViT on handwritten digits with AdamW and with a second-order optimizer, and compare them.
# Arguments go to demo.py; `scripts/demo.sh --help` lists them.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
environment hf
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a model this small gains nothing from threads, and loses on a busy machine
exec python scripts/demo.py "$@"
