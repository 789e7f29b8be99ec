"""The benchmarks: the suite, scenarios, sweeps, whole evaluations, training steps, drop-in models and kernels."""
