"""Errors about what files are made from, where numbers come from, and how files are read."""

from __future__ import annotations

from tests.planted.plant import planted

KEYS, RUNNER, READING = "tests/lab/test_keys.py", "tests/lab/test_runner.py", "tests/core/test_reading.py"
DAG = "tests/lab/test_dag.py"
TREE, STORE, SCHEMA = "tests/core/test_source_tree.py", "tests/lab/table/test_store.py", "tests/core/test_schema.py"


@planted("lorafusion.lab.dag:Step.reason", caught_by=f"{RUNNER}::test_an_old_workload_is_not_taken_for_another_seeds")
def a_file_that_is_there_is_up_to_date(original):
    """Whatever file is there is taken, also one of an older suite."""
    return lambda step: "" if step.path.exists() else "missing"


@planted(
    "lorafusion.lab.dag:Step.key", caught_by=f"{DAG}::test_steps_whose_settings_change_and_no_others_are_made_again"
)
def the_key_of_a_step_forgets_its_inputs(original):
    """The key of a step depends on its own settings, not on those of what it is made from."""
    from functools import cached_property

    from lorafusion.core.workload import content_hash

    return cached_property(lambda step: content_hash([step.kind.name, step.name, step.settings()]))


@planted("lorafusion.lab.dag:Step.require_current", caught_by=f"{DAG}::test_a_step_refuses_inputs_of_other_settings")
def a_step_takes_inputs_of_other_settings(original):
    """A step reads whatever inputs are there, whatever keys they have."""
    return lambda step: None


@planted("lorafusion.lab.keys:CellFiles.workload", caught_by=f"{KEYS}::test_a_workload_of_an_older_suite_is_refused")
def a_workload_is_known_by_its_name(original):
    """A run takes any workload file, whatever seed and samples it was made with."""
    from lorafusion.core.workload import Workload

    return lambda self, path: Workload.read(path)


@planted("lorafusion.lab.keys:configuration_hash", caught_by=f"{RUNNER}::test_a_result_of_an_older_suite_is_made_anew")
def the_hash_of_a_configuration_forgets_the_suite(original):
    """The hash of a cell's configuration depends on its name and system alone."""
    from lorafusion.core.workload import content_hash

    return lambda suite, cell, system: content_hash([cell.name, system.model_dump(mode="json")])


@planted(
    "lorafusion.lab.keys:CellFiles.capacity",
    caught_by=f"{RUNNER}::test_a_plan_has_the_capacity_that_the_tuning_of_its_workload_found",
)
def a_tuned_cell_keeps_its_first_capacity(original):
    """A tuned cell is planned with the most that its suite lets be tried, whatever its tuning found."""
    return lambda self, tuned: self.cell.grid.capacity_of(self.cell.workload)


@planted("lorafusion.planning:plan_key", caught_by=f"{KEYS}::test_a_plan_that_was_changed_by_hand_is_refused")
def the_key_of_a_plan_forgets_its_order(original):
    """The key of a plan depends on its workload and its planner, not on its microbatches."""
    from lorafusion.core.workload import content_hash

    return lambda plan, planner, options: content_hash([planner, plan.workload_hash, plan.capacity])


@planted("lorafusion.core.seals:content_hash", caught_by=f"{KEYS}::test_a_tuning_that_was_changed_by_hand_is_refused")
def a_tuning_is_not_sealed(original):
    """The seal of a tuning is the same whatever was measured."""
    return lambda data: "0" * 16


@planted(
    "lorafusion.lab.table.table:require_own_seal",
    caught_by="tests/lab/table/test_table.py::test_a_result_that_was_changed_by_hand_is_refused",
)
def a_table_takes_results_that_were_edited(original):
    """A throughput that is changed in a result file goes into the table."""
    return lambda data, source: None


@planted(
    "lorafusion.lab.keys:require_own_seal", caught_by=f"{KEYS}::test_a_result_that_was_changed_by_hand_is_not_this_ones"
)
def a_result_that_was_edited_is_kept(original):
    """A result file that was changed by hand is not measured again."""
    return lambda data, source: None


@planted(
    "lorafusion.lab.checks.verdicts:require_own_seal",
    caught_by="tests/lab/checks/test_checking.py::test_a_verdict_that_was_changed_by_hand_is_refused",
)
def a_verdict_may_be_edited(original):
    """A verdict whose figure or suite was changed by hand is believed."""
    return lambda data, source: None


@planted(
    "lorafusion.lab.keys:require_one_workload",
    caught_by=f"{STORE}::test_systems_that_trained_different_workloads_are_not_compared",
)
def systems_are_compared_over_different_workloads(original):
    """A table takes runs of two systems that trained different samples."""
    return lambda trained: None


@planted(
    "lorafusion.lab.experiments.experiment:step_command",
    caught_by=f"{RUNNER}::test_each_run_has_a_log_and_a_command_of_its_own",
)
def a_run_records_the_command_of_the_whole_suite(original):
    """The command of each run is that which ran the suite."""
    return lambda suite_path, out: f"lorafusion lab run {suite_path} --here"


@planted(
    "lorafusion.core.source_tree:is_repository",
    caught_by=f"{TREE}::test_a_repository_around_the_project_is_somebody_elses",
)
def any_repository_around_is_this_projects(original):
    """The commit is that of whatever repository encloses the project's folder."""
    from lorafusion.core import source_tree

    return lambda root: source_tree._git(root, "rev-parse", "--show-toplevel") is not None


@planted(
    "lorafusion.core.source_tree:state",
    caught_by=f"{TREE}::test_a_changed_or_a_new_source_file_is_another_tree_and_dirty",
)
def local_changes_are_not_told(original):
    """`git_dirty` is always False."""
    from lorafusion.core.source_tree import ROOT

    return lambda root=ROOT: original(root) | {"git_dirty": False}


@planted(
    "lorafusion.core.source_tree:tree_hash",
    caught_by=f"{TREE}::test_a_changed_or_a_new_source_file_is_another_tree_and_dirty",
)
def the_hash_of_the_tree_is_of_its_names(original):
    """The hash of the source files changes with their names, not with their contents."""
    from lorafusion.core import source_tree

    def tree_hash(root=source_tree.ROOT):
        names = (path for name in source_tree.SOURCES for path in source_tree._files(root / name))
        return source_tree._hash({path.relative_to(root).as_posix(): "" for path in names})

    return tree_hash


@planted(
    "lorafusion.lab.table.store:write_store",
    caught_by=f"{STORE}::test_a_store_has_the_losses_and_all_that_a_result_had",
)
def a_store_has_no_losses(original):
    """The store beside a table keeps the metrics of its runs and leaves their losses out."""
    return lambda csv, results: original(csv, {name: one | {"losses": {}} for name, one in results.items()})


@planted(
    "lorafusion.lab.table.store:require_store", caught_by=f"{STORE}::test_a_table_that_is_not_its_stores_is_refused"
)
def a_table_is_not_compared_with_its_store(original):
    """A table is read whatever the store beside it was written with."""
    return lambda path, table: None


@planted(
    "lorafusion.core.files:distinct",
    caught_by=f"{READING}::test_a_json_file_that_says_two_things_or_no_number_is_refused",
)
def of_two_equal_keys_the_last_counts(original):
    """In JSON a key may come twice; its last value counts."""
    return dict


@planted(
    "lorafusion.core.files:_require_distinct_keys",
    caught_by=f"{READING}::test_a_yaml_file_that_says_two_things_or_nothing_is_refused",
)
def a_yaml_file_is_taken_as_its_parser_takes_it(original):
    """In YAML a key may come twice."""
    return lambda node, loader, path: None


@planted("lorafusion.core.files:_require_small", caught_by=f"{READING}::test_aliases_that_blow_up_are_refused_at_once")
def aliases_may_stand_for_any_number_of_values(original):
    """A YAML file of a few lines may stand for more values than memory holds."""
    return lambda text, path: None


@planted("lorafusion.core.schema:meant", caught_by=f"{SCHEMA}::test_a_jobs_file_has_numbers_with_exponents")
def a_number_with_an_exponent_is_a_word(original):
    """A setting 1e-4 is the word that YAML 1.1 takes it for."""
    return lambda value, annotation: value


@planted("lorafusion.core.schema:shortened", caught_by=f"{READING}::test_an_error_is_one_line_whatever_it_found")
def a_message_is_as_long_as_what_was_found(original):
    """An error's message has all of the value that was found."""
    return lambda text, most: text
