"""Which folder each package lies in: `kernels`, `export` and `benchmarks` beside `xfm_fast` are installed inside it.

The links of the same names in `xfm_fast` serve editors, type checkers and a checkout that is not installed. Builds do
not need them, so that a checkout whose links became text files (an unpacked ZIP, Windows) still installs whole. None of
the three has an `__init__.py`: on the path of a program that starts in the checkout it would hide a distribution of its
name, such as Hugging Face's `kernels`.
"""

from setuptools import find_namespace_packages, find_packages, setup

BESIDE = ("benchmarks", "export", "kernels")

within = find_packages(
    include=["xfm_fast", "xfm_fast.*"], exclude=[f"xfm_fast.{name}*" for name in BESIDE]
)
beside = [
    f"xfm_fast.{name}"
    for name in find_namespace_packages(
        include=[*BESIDE, *(f"{name}.*" for name in BESIDE)],
        exclude=["benchmarks.micro*", "benchmarks.results*", "*.__pycache__"],
    )
]
setup(packages=within + beside, package_dir={f"xfm_fast.{name}": name for name in BESIDE})
