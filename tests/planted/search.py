"""Errors in the local search of plans."""

from __future__ import annotations

from tests.planted.plant import planted

SEARCH = "tests/planning/test_search.py"
BOUNDS = "tests/planning/test_bounds.py"


@planted(
    "lorafusion.planning.search:Search._may_close",
    caught_by=f"{SEARCH}::test_what_is_searched_stays_a_plan_and_gets_no_slower",
)
def slots_close_against_the_dependency_rule(original):
    """Local search takes a slot away where an adapter's global batch then enters before the step of the last one."""
    return lambda search, place: True


@planted(
    "lorafusion.planning.search:Search._legal",
    caught_by=f"{SEARCH}::test_what_is_searched_stays_a_plan_and_gets_no_slower",
)
def samples_change_places_without_a_rule(original):
    """Local search moves samples past the dependency rule and the capacity."""
    return lambda search, place, gone, come, there: there > place


@planted(
    "lorafusion.planning.simulator.waves:Waves.back",
    caught_by=f"{SEARCH}::test_a_change_is_judged_as_it_is_simulated",
)
def what_comes_after_a_change_is_not_waited_for(original):
    """Local search forgets what a run has still to do on the other half of the stages."""

    def back(waves, left, turn, parity):
        if parity == 0:
            original(waves, left, turn, parity)

    return back


@planted(
    "lorafusion.planning.search:Search.run",
    caught_by=f"{SEARCH}::test_tiny_plans_are_near_the_best_of_all",
)
def nothing_is_searched(original):
    """Plans of few samples stay as they were packed."""
    return lambda search, budget: budget


@planted(
    "lorafusion.planning.bounds:_around",
    caught_by=f"{BOUNDS}::test_no_plan_takes_less_than_the_bound_of_time",
)
def the_bound_counts_filling_twice(original):
    """The bound of time counts the first forwards before a stage and the last backwards after it twice."""
    return lambda model, shortest: 2 * original(model, shortest)


@planted(
    "lorafusion.planning.bounds:_orders",
    caught_by=f"{BOUNDS}::test_the_bound_of_one_global_batch_is_what_the_best_of_all_its_plans_takes",
)
def the_bound_knows_one_microbatch_only(original):
    """The bound of time takes the samples of a global batch for one microbatch, which takes longer than several."""
    return lambda left: iter([(left,)])
