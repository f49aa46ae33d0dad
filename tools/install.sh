#!/usr/bin/env bash
# Makes .venv from nothing: system packages where it may, a CPU torch unless a GPU is there, the three
# packages editable, and the tools that the Makefile calls. Safe to run again; the Makefile runs it
# only when a pin or a pyproject.toml changed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m[install]\033[0m %s\n' "$*"; }

missing_packages() {
  command -v gcc >/dev/null || echo gcc
  command -v g++ >/dev/null || echo g++
  command -v make >/dev/null || echo make
  java -version >/dev/null 2>&1 || echo default-jre-headless
  command -v python3 >/dev/null || echo python3
  python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
}

packages=$(missing_packages | tr '\n' ' ')
if [ -n "${packages// /}" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing system packages: $packages"
    apt-get update -qq
    # shellcheck disable=SC2086  (a list of words on purpose)
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
  else
    say "missing system packages, and no right to install them: $packages"
    say "run: sudo apt-get install -y $packages"
    case " $packages" in *" gcc "*|*" make "*|*" python3"*) exit 1 ;; esac
    say "going on without (Java is needed by ScienceWorld alone)"
  fi
fi

python=$(command -v python3.11 || command -v python3)
"$python" - <<'CHECK' || { say "pz needs Python 3.11 or newer; found $("$python" --version)"; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
CHECK

[ -x .venv/bin/python ] || { say "creating .venv with $("$python" --version)"; "$python" -m venv .venv; }
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)

torch_index=()
if ! nvidia-smi -L >/dev/null 2>&1; then
  cpu_wheels=https://download.pytorch.org/whl/cpu
  if .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_wheels/torch/', timeout=5)" 2>/dev/null; then
    torch_index=(--index-url "$cpu_wheels")
  fi
fi
say "installing torch ($(nvidia-smi -L >/dev/null 2>&1 && echo GPU || echo CPU))"
"${pip[@]}" -c constraints.txt ${torch_index[@]+"${torch_index[@]}"} "$(grep -E '^torch==' constraints.txt)"

say "installing pz-envs, pz-agents, pz-bench and their tools"
"${pip[@]}" -c constraints.txt -e './pz_envs[math]' -e './pz_agents[train,openai,search,ray]' -e ./pz_bench \
  pytest pytest-timeout pytest-xdist hypothesis ruff mypy types-PyYAML
# Wheels that ask for more than pz calls: jericho's for spaCy (234 MB), and textworld's for jericho;
# rliable's for a plotting stack, where the tests compare with its metrics alone.
"${pip[@]}" -c constraints.txt py4j tatsu networkx more_itertools hashids mementos prompt_toolkit termcolor tqdm
"${pip[@]}" -c constraints.txt --no-deps jericho textworld alfworld scienceworld rliable
# ALFWorld's reference engine plans with Fast Downward, compiled here (minutes); our own does without.
PATH="$PWD/.venv/bin:$PATH" "${pip[@]}" -c constraints.txt --no-deps fast-downward-textworld ||
  say "no Fast Downward: ALFWorld's reference engine is left out"
say "done: $(du -sh .venv | cut -f1) in .venv"
