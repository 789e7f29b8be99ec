"""No package that an installation brings has a licence that would bind its users."""

import pytest

from tests.reliability.packages import binds, brought_by, licence_of, name_of


def test_no_licence_binds() -> None:
    packages = [*brought_by("xfm-fast")]
    if not packages:
        pytest.skip("xfm-fast is not installed here, so that nobody says what it brings")
    assert {"torch", "numpy", "safetensors"} <= {name_of(package.metadata["Name"]) for package in packages}
    assert not [
        f"{package.metadata['Name']}: {licence_of(package)}" for package in packages if binds(licence_of(package))
    ]


@pytest.mark.parametrize(
    ("licence", "bound"),
    [
        ("MIT", False),
        ("GPL-3.0-only", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0", True),
        ("LGPL-2.1", False),
        ("MIT OR GPL-2.0", False),
        ("BSD-3-Clause AND GPL-2.0", True),
        ("not said", False),
    ],
)
def test_licences(licence: str, bound: bool) -> None:
    assert binds(licence) == bound


def test_names() -> None:
    assert [name_of(each) for each in ("Torch_Vision>=1", "a.b[x]; extra == 'y'", "c (>=2)")] == [
        "torch-vision",
        "a-b",
        "c",
    ]
