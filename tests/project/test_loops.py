"""A test that loops over its cases runs all of them, and names each that fails."""

from __future__ import annotations

import inspect

import pytest
from jaxtyping import config

from hooked_hybrid.runs.identity.modules import wrapped_by_tools
from tests import checking
from tests.loops import CHECKED_ONE_IN, looped


def test_every_case_runs_and_every_failure_is_named_with_its_error():
    ran = []

    @looped("n", [1, 2, 3])
    @looped("word, size", [("a", 1), pytest.param("b", 2, id="bee")])
    def check(n: int, word: str, size: int) -> None:
        ran.append((n, word, size))
        assert n != 2 or word == "a", "wrong"
        if n == 3:
            raise KeyError(word)

    with pytest.raises(ExceptionGroup, match="^3 of 6 cases: 2-bee, 3-a-1, 3-bee") as failed:
        check()
    assert ran == [(n, word, size) for n in (1, 2, 3) for word, size in (("a", 1), ("b", 2))]
    assert [type(error) for error in failed.value.exceptions] == [
        AssertionError,
        KeyError,
        KeyError,
    ]
    assert failed.value.exceptions[0].__notes__ == ["2-bee"]


def test_other_arguments_stay_fixtures_and_may_choose_the_cases():
    ran = []

    @looped("item", lambda bag: bag)
    def check(bag: list[int], item: int) -> None:
        ran.append(item)

    assert list(inspect.signature(check).parameters) == ["bag"]
    check(bag=[4, 5])
    assert ran == [4, 5]
    with pytest.raises(AssertionError, match="no case"):
        check(bag=[])
    with pytest.raises(AssertionError, match="not the arguments"):
        looped("other", [1])(check)


def test_a_loop_cannot_pass_over_what_pytest_marks():
    with pytest.raises(AssertionError, match="marked"):
        looped("n", [pytest.param(1, marks=pytest.mark.skip)])(lambda n: None)()


@pytest.mark.parametrize("on", [True, False])
def test_one_in_eight_cases_is_checked_where_the_test_is(on: bool):
    seen = []

    @looped("n", range(CHECKED_ONE_IN + 1))
    def check(n: int) -> None:
        seen.append(not config.jaxtyping_disable)

    checking.turn(on)
    check()
    assert seen == [on, *[False] * (CHECKED_ONE_IN - 1), on]
    assert config.jaxtyping_disable is not on


def test_an_inner_function_is_checked_once_in_a_checked_test_and_never_in_another():
    def outer() -> object:
        @checking.jaxtyped(typechecker=checking.when_called)
        def inner(x: int) -> int:
            return x

        return inner

    checking.turn(on=True)
    first, second = outer(), outer()
    assert second("a") == "a"  # type: ignore[operator]
    assert all(wrapped_by_tools(fn) is not None for fn in (first, second))
    with pytest.raises(TypeError):
        first("a")  # type: ignore[operator]
    checking.turn(on=False)
    unchecked = outer()
    assert unchecked("a") == "a" and wrapped_by_tools(unchecked) is not None  # type: ignore[operator, arg-type]


def test_of_a_functions_calls_in_a_checked_test_the_first_are_checked_and_then_one_in_so_many():
    @checking.sometimes_checked
    def double(x: int) -> int:
        return 2 * x

    def refused(n: int) -> list[int]:
        found = []
        for i in range(1, n + 1):
            try:
                double("a")  # type: ignore[arg-type]
            except TypeError:
                found.append(i)
        return found

    n = 2 * checking.THEN_ONE_IN
    expected = [*range(1, checking.FIRST + 1), checking.THEN_ONE_IN, n]
    checking.turn(on=True)
    assert refused(n) == expected
    checking.turn(on=True)
    assert refused(n) == expected, "counted from the start of each test"
    checking.turn(on=False)
    assert refused(n) == []
    assert wrapped_by_tools(double) is not None
