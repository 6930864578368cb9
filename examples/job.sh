#!/bin/sh
# A job in a shell script: it begins with a provisioned guest, and keeps the guest of a failure.
# QSNAP_MONITOR names the guest's monitor.
set -eu

: "${JOB_ID:=$(date +%Y%m%d%H%M%S)}"

# The first job provisions the guest, all others load what it has left.
qsnap ensure provisioned --timeout 600 -- "${PROVISION:-./provision}"

# Whatever ends this script from here on, a failed one leaves a snapshot for the post-mortem. That never fails or hangs it.
trap 'code=$?; [ $code -eq 0 ] || qsnap save -q --timeout 120 "failed-$JOB_ID" || true; exit $code' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

"${TESTS:-./run-tests}"
