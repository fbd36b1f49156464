#!/usr/bin/env bash
# Everything once on one GPU in at most 12 minutes: ./tests/gpu/quarter.sh OUT [--small] [--stages quantizer,ar] …
# OUT/summary.json gets a row for each command, OUT/log.txt what the commands print. `--help` lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.quarter "$@"
