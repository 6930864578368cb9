"""The typed words that all packages share: what QEMU tells, and what qsnap says about it. No I/O."""
