"""The benchmarks: the suite, scenarios, whole evaluations, training steps, drop-in models and kernels."""
