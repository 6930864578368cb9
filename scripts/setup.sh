# Sourced by the scripts beside it: what they need, installed. Says what it is about to install, and installs nothing twice.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
venv=$top/.venv

# need_packages PROGRAM:PACKAGE ...: install the Debian packages of the programs that are missing
need_packages() {
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%:*}" > /dev/null || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get > /dev/null || { echo "please install: ${missing[*]} (there is no apt-get here)" >&2; exit 1; }
  local sudo=
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  echo "== installing Debian packages: ${missing[*]}" >&2
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
}

# find_python: the name of a Python of 3.11 or later that can make virtual environments
find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

# need_python: one is there, or is installed
need_python() {
  find_python > /dev/null && return
  need_packages python3:python3
  local version
  version=$(python3 -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
  case $version in
    3.[0-9] | 3.10) need_packages no-python:python3.11 no-venv:python3.11-venv ;;
    *) need_packages no-venv:python3-venv ;;
  esac
  find_python > /dev/null || { echo "qsnap needs Python 3.11 or later with venv" >&2; exit 1; }
}

# need_qsnap EXTRA: qsnap and what it needs, in .venv; EXTRA is "" or "[dev]"
need_qsnap() {
  need_python
  local wanted
  wanted="$1 $(cat pyproject.toml | cksum)"
  if [ -x "$venv/bin/qsnap" ] && "$venv/bin/qsnap" --version > /dev/null 2>&1; then
    case "$(cat "$venv/.installed" 2> /dev/null)" in "$wanted" | "[dev] ${wanted#* }") return ;; esac
  fi
  echo "== installing qsnap$1 and its Python packages into $venv" >&2
  "$(find_python)" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$1"
  echo "$wanted" > "$venv/.installed"
}
