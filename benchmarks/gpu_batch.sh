#!/usr/bin/env bash
# Trains what profiles lack on a GPU that is there for minutes: see gpu_batch.py beside this file, or --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
exec "$python" benchmarks/gpu_batch.py "$@"
