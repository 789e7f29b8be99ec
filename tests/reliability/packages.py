"""The packages that an installation brings: their licences, and the faults that are known of them.

`make packages` prints both. A licence that would bind what is built with xfm-fast ends it with 1. Known faults are
asked for over the network, where there is one, and printed; they end it with 1 under `--strict` alone, for the day on
which one is published is no property of a commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

# Licences under which a program that imports the package must be given away in the same way.
_BINDING = re.compile(r"\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)
_PATIENCE = 90.0
# What pip-audit says where it reaches nobody.
_UNREACHED = re.compile(r"connection|timed? ?out|resolve|unreachable|max retries|proxy|ssl", re.IGNORECASE)


def name_of(requirement: str) -> str:
    """The package of a requirement such as `torch>=2.9; sys_platform == 'linux'`, as it is spelt in indexes."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[;<>=!~(@]", requirement.strip(), maxsplit=1)[0]).lower()


def brought_by(name: str) -> Iterator[Distribution]:
    """The installed packages that an installation without extras brings, the package itself left out."""
    seen, rest = set(), [name]
    while rest:
        try:
            found = distribution(rest.pop())
        except PackageNotFoundError:
            continue
        for requirement in found.requires or []:
            # What an extra wants is not brought.
            wanted = name_of(requirement)
            if "extra ==" not in requirement and wanted not in seen:
                seen.add(wanted)
                rest.append(wanted)
                try:
                    yield distribution(wanted)
                except PackageNotFoundError:
                    continue


def licence_of(package: Distribution) -> str:
    """The licence of a package in a few words: its expression, its classifiers, or the first line of its text."""
    # A message of the standard library, of which its type tells less.
    metadata: Any = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    if classifiers:
        return ", ".join(each.rpartition(" :: ")[2] for each in classifiers)
    return next(iter((metadata.get("License") or "").strip().splitlines()), "") or "not said"


def binds(licence: str) -> bool:
    """True where a licence leaves no choice but one that binds: of `MIT OR GPL-2.0` anyone may take the first."""
    return all(_BINDING.search(each) and "LGPL" not in each for each in re.split(r"\bOR\b", licence))


def known_faults() -> tuple[list[str], str]:
    """A line for every known fault of an installed package, and why there is no answer (empty where there is one)."""
    if find_spec("pip_audit") is None:
        return [], "pip-audit is not installed: pip install pip-audit"
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off", "--timeout=10"]
    try:
        done = subprocess.run(
            [*command, "--format=json"], capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return [], "nobody answered in time"
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return [], "there is no network" if _UNREACHED.search(done.stderr) else last[:200]
    return [
        f"{package['name']} {package['version']}: {fault['id']}"
        + (f", mended in {fault['fix_versions'][0]}" if fault["fix_versions"] else "")
        for package in packages
        for fault in package.get("vulns", [])
    ], ""


def main() -> int:
    """Print licences and known faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="end with 1 where a fault is known")
    options = parser.parse_args()
    packages = sorted(brought_by("xfm-fast"), key=lambda package: package.metadata["Name"].lower())
    binding = 0
    for package in packages:
        licence = licence_of(package)
        binding += binds(licence)
        print(f"{package.metadata['Name']} {package.version}: {licence}{' (BINDING)' if binds(licence) else ''}")
    faults, why_not = known_faults()
    print("\n".join(f"known fault: {line}" for line in faults) or f"known faults: {why_not or 'none'}")
    return int(binding > 0 or (options.strict and bool(faults)))


if __name__ == "__main__":
    sys.exit(main())
