"""Series of snapshots over time: which to keep, whether the newest is fresh, and the metrics of both."""
