"""The typed words that all packages share: what QEMU tells, checks, snapshots, requests and results. No I/O."""
