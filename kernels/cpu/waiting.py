"""Thread waiting policy of libgomp, PyTorch's OpenMP on Linux, which spins for milliseconds by default.

Spinning is best with the machine to oneself. If a second process competes for the cores, both take several times as
long. libgomp reads the policy when PyTorch loads it; later changes have no effect. This module does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# Long enough for most waits inside an operation: a microsecond or two. libgomp's own number is 300,000.
_BRIEFLY = "1000"


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Make processes with this environment spin for microseconds before they sleep, unless it sets a policy."""
    if POLICY not in environment:
        environment.setdefault(SPINS, _BRIEFLY)


def describe(environment: Mapping[str, str]) -> str:
    """Describe how threads wait, and what to do where other processes compete."""
    policy, spins = environment.get(POLICY, "").lower(), environment.get(SPINS, "").lower()
    if policy == "passive" or (spins.isdigit() and int(spins) <= int(_BRIEFLY)):
        setting = f"{SPINS}={spins}" if spins else f"{POLICY}={policy}"
        return f"briefly ({setting}); in programs of your own beside others, set it before PyTorch is imported"
    return (
        f"spinning: best alone on the machine, several times slower beside other processes; for those set "
        f"{SPINS}={_BRIEFLY} before PyTorch is imported"
    )
