"""Throughput and latency: what is timed, against which baselines, and how it is reported."""
