"""Work that a fault of the machine strikes ends as undisturbed work does; `make soak` strikes at every moment."""

from __future__ import annotations

import pytest

from tools.injection import WORKS, Bench, Fault, Kind


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("kind", "at"), [("kill", 0.5), ("full", 0.6)])
def test_reranking_goes_on(bench: Bench, kind: Kind, at: float) -> None:
    operations = bench.whole("re-ranking")[1]
    assert operations > 4
    end = bench.disturbed("re-ranking", Fault(kind, int(at * operations)))
    assert end == {"kill": "killed", "full": "refused"}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full"])
@pytest.mark.parametrize("name", WORKS)
def test_work_goes_on(bench: Bench, name: str, kind: Kind) -> None:
    operations = bench.whole(name)[1]
    for at in (1, (1 + operations) // 2, operations):
        bench.disturbed(name, Fault(kind, at))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name not in ("re-ranking", "indexing")])
def test_two_processes_go_on(bench: Bench, name: str) -> None:
    operations, seconds = bench.whole(name, 2)[1:]
    bench.disturbed(name, Fault("kill", operations // 2), 2)
    bench.disturbed(name, Fault(), 2, 0.8 * seconds)
