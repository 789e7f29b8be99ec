"""Which folder each package lies in: `kernels`, `export` and `benchmarks` beside `xfm_fast` are installed inside it.

The links of the same names in `xfm_fast` serve editors, type checkers and a checkout that is not installed. Builds do
not need them, so that a checkout whose links became text files (an unpacked ZIP, Windows) still installs whole.
"""

from setuptools import find_packages, setup

BESIDE = ("benchmarks", "export", "kernels")

within = find_packages(
    include=["xfm_fast", "xfm_fast.*"], exclude=[f"xfm_fast.{name}*" for name in BESIDE]
)
beside = [f"xfm_fast.{name}" for name in find_packages(include=[f"{name}*" for name in BESIDE])]
setup(packages=within + beside, package_dir={f"xfm_fast.{name}": name for name in BESIDE})
