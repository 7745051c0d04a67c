"""How a row of the scorecard shows that it can fail.

    @pytest.mark.row(5, no_hashes)
    def test_one_flipped_bit(...): ...

runs the test as it is, and once more for each mutation: a function that takes a protection away with
`monkeypatch`. There the test has to fail: by an assertion, by an error that did not come, or by one of dqt's
that did. If it passes, it tests nothing, and that is reported as a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from nursery import Nursery
from strangers import one_of_each

from dqt.errors import DqtError

Mutation = Callable[[pytest.MonkeyPatch], None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(number, *mutations): a row of the scorecard, see tests/faults")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if marker := metafunc.definition.get_closest_marker("row"):
        mutations = [None, *marker.args[1:]]
        names = ["whole", *(f"without-{mutation.__name__}" for mutation in mutations if mutation)]
        metafunc.parametrize("mutation", mutations, ids=names, indirect=True)


@pytest.fixture(autouse=True)
def mutation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mutation | None:
    """What is taken away in this run of the test; None is nothing."""
    taken: Mutation | None = getattr(request, "param", None)
    if taken is not None:
        taken(monkeypatch)
    return taken


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    taken = pyfuncitem.funcargs.get("mutation")
    if taken is None:
        return (yield)
    try:
        yield
    except (AssertionError, pytest.fail.Exception, DqtError):
        return True
    pytest.fail(f"the test passes without {taken.__name__}: it can't fail")


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts `dqt` processes by a fork, without the seconds that imports take."""
    with Nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of each that a loader is given; not to be changed."""
    return one_of_each(tmp_path_factory.mktemp("whole") / "x")
