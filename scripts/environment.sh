# Sourced by demo.sh and test.sh. After `environment EXTRAS [PIP ARGUMENTS]` the virtual environment .venv has this
# package with those extras, at the pinned versions, and stands first on PATH. A second call finds it ready.

# The CPU build of torch where there is no NVIDIA GPU: PyPI's Linux build brings gigabytes of CUDA libraries.
install_torch() {
  local wanted
  wanted=$(grep '^torch==' scripts/constraints.txt)
  if [ "$(uname -s)" != Linux ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then
    pip install "$wanted"
    return
  fi
  # In this order: a wheel or mirror that pip is configured for, PyTorch's own index, whatever PyPI has.
  pip install "$wanted+cpu" 2>/dev/null ||
    pip install "$wanted+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ||
    pip install "$wanted"
}

environment() {
  local extras=$1 made_from
  shift
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
  made_from=$(cat pyproject.toml scripts/constraints.txt scripts/environment.sh | cksum)
  if [ "$made_from" = "$(cat ".venv/made-from-$extras" 2>/dev/null)" ]; then
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.11 or newer is needed." if sys.version_info < (3, 11) else 0)'
    "${PYTHON:-python3}" -m venv .venv
  fi
  python -c 'import torch' 2>/dev/null || install_torch
  pip install -c scripts/constraints.txt -e ".[$extras]"
  [ $# = 0 ] || pip install "$@"
  echo "$made_from" >".venv/made-from-$extras"
}
