"""Errors in what a training keeps to be interrupted anywhere: checkpoints, events, locks, exports, status."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from tests.planted.plant import planted

MANIFEST = "tests/core/test_manifest.py"
MOMENTS = "tests/engine/test_checkpoint_moments.py"
CHECKPOINT = "tests/engine/test_checkpoint.py"
LOCK = "tests/launch/test_lock.py"
METRICS = "tests/train/test_metrics.py"
EXPORT = "tests/train/test_export.py"
STATUS = "tests/train/test_status.py"


@planted("lorafusion.core.manifest:FileEntry.require", caught_by=f"{MANIFEST}::test_any_bit_counts")
def hashes_are_not_compared(original):
    """A file of a manifest is compared by its length alone."""

    def require(self, path):
        with patch.object(type(self), "of", lambda _: self):
            original(self, path)

    return require


@planted("lorafusion.core.manifest:read_sealed", caught_by=f"{MANIFEST}::test_any_bit_counts")
def a_manifest_is_believed(original):
    """A sealed file is not compared with its own hash."""
    import json

    def read_sealed(path):
        data = json.loads(Path(path).read_text())
        return {key: value for key, value in data.items() if key != "sha256"}

    return read_sealed


@planted(
    "lorafusion.core.manifest:verified",
    caught_by=f"{MANIFEST}::test_files_that_are_missing_new_or_swapped_count[with_another]",
)
def files_that_were_added_are_overlooked(original):
    """A folder may hold files that its manifest does not list."""

    def verified(folder):
        with patch.object(Path, "iterdir", lambda _: iter(())):
            return original(folder)

    return verified


@planted(
    "lorafusion.engine.checkpoint:opened",
    caught_by=f"{CHECKPOINT}::test_a_bad_checkpoint_is_refused_and_the_last_good_one_taken[another folder]",
)
def a_renamed_checkpoint_is_taken(original):
    """The slot of a checkpoint is not compared with the name of its folder."""
    from lorafusion.engine import checkpoint

    def opened(path, *arguments):
        with patch.object(checkpoint, "slot_name", lambda _: path.name):
            return original(path, *arguments)

    return opened


@planted(
    "lorafusion.engine.saving:Checkpoints._others", caught_by=f"{MOMENTS}::test_the_manifest_comes_after_all_parts"
)
def a_checkpoint_is_sealed_before_it_is_whole(original):
    """The first process seals a checkpoint without waiting for the others' parts."""

    def others(self, slot):
        return []

    return others


@planted(
    "lorafusion.engine.checkpoint:newest",
    caught_by=f"{CHECKPOINT}::test_where_none_is_good_nothing_is_begun_anew_in_silence",
)
def a_run_whose_checkpoints_are_damaged_is_begun_anew(original):
    """Where no checkpoint is good a run begins anew."""
    from lorafusion.engine.checkpoint import CheckpointError

    def newest(*arguments):
        try:
            return original(*arguments)
        except CheckpointError:
            return None, []

    return newest


@planted("lorafusion.engine.checkpoint:adapter_state", caught_by=f"{MOMENTS}::test_half_a_checkpoint_is_no_adapter")
def half_a_checkpoint_is_exported(original):
    """An adapter is read from the parts of a checkpoint that are there while it is being removed."""
    from lorafusion.engine.checkpoint import Checkpoint

    part = Checkpoint.part

    def adapter_state(found, job):
        there = [part(found, rank) for rank in range(found.processes) if part(found, rank).exists()]
        with patch.object(Checkpoint, "part", lambda _, rank: there[rank % len(there)]):
            return original(found, job)

    return adapter_state


@planted("lorafusion.engine.checkpoint:_require_fit", caught_by=f"{MOMENTS}::test_tensors_must_fit_the_adapter")
def any_tensor_fits(original):
    """The shapes of a checkpoint's tensors are not compared with the adapter's."""

    def require_fit(path, adapter, state, needed):
        pass

    return require_fit


@planted("lorafusion.engine.checkpoint:load_initial", caught_by=f"{MOMENTS}::test_jobs_do_not_begin_elsewhere")
def swapped_states_are_taken(original):
    """Whose file a state is, that a job begins with, is not compared."""
    from lorafusion.core import manifest

    def load_initial(*arguments):
        with patch.object(manifest, "verified", manifest.facts_of):
            original(*arguments)

    return load_initial


@planted("lorafusion.engine.saving:Checkpoints._clear", caught_by=f"{MOMENTS}::test_saving_is_all_or_nothing[killed]")
def the_last_checkpoint_goes_before_the_next_is_there(original):
    """All older checkpoints are removed, whether the newest one is whole or not."""
    from lorafusion.engine import saving

    seal = saving.Checkpoints._seal

    def seal_late(self, folder, slot, parts):
        for old in saving.slots(self.folder)[:-1]:
            saving.shutil.rmtree(old)
        seal(self, folder, slot, parts)

    saving.Checkpoints._seal = seal_late
    return original


@planted(
    "lorafusion.engine.saving:HostCopy.take",
    caught_by=f"{MOMENTS}::test_a_run_trains_on_while_its_checkpoint_is_written",
)
def a_checkpoint_has_what_was_trained_meanwhile(original):
    """The state of a run is copied when it is written, while the run trains on."""
    from lorafusion.engine import saving

    write = saving.HostCopy.write

    def write_late(self, path):
        original(self)
        return write(self, path)

    def take(self):
        pass

    saving.HostCopy.write = write_late
    return take


@planted(
    "lorafusion.engine.saving:Checkpoints._is_free",
    caught_by=f"{MOMENTS}::test_one_that_is_still_being_written_delays_the_next_of_every_process",
)
def processes_do_not_ask_whether_to_save(original):
    """Other processes than the first save, whether or not that one has time to."""

    def is_free(self, slot):
        return self.rank > 0 or original(self, slot)

    return is_free


@planted(
    "lorafusion.engine.saving:Checkpoints._raise_failure",
    caught_by=f"{MOMENTS}::test_an_error_of_writing_ends_the_run_at_its_next_microbatch",
)
def a_checkpoint_that_cannot_be_written_is_not_missed(original):
    """What goes wrong while a checkpoint is written is known at the end of the run."""

    def raise_failure(self):
        pass

    return raise_failure


@planted(
    "lorafusion.engine.events:parse", caught_by=f"{METRICS}::test_a_broken_line_is_an_error_that_names_it[no JSON]"
)
def a_broken_event_is_skipped(original):
    """A line of events that is no JSON is passed over without a word."""
    from lorafusion.core.manifest import DamagedError

    def parse(path, data, take, first_line=1):
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            try:
                original(path, line, take)
            except DamagedError:
                continue
        return len(whole)

    return parse


@planted("lorafusion.engine.events:require", caught_by=f"{METRICS}::test_any_bit_of_what_was_noted_counts")
def events_are_believed(original):
    """The events before a checkpoint are not compared with their hash."""

    def require(folder, kept):
        pass

    return require


@planted("lorafusion.engine.events:trim", caught_by=f"{METRICS}::test_what_is_run_again_is_dropped_first")
def events_of_slots_that_are_run_again_stay(original):
    """What comes after the checkpoint that is resumed from stays in the events."""

    def trim(path, keep):
        pass

    return trim


@planted("lorafusion.train.metrics:History.require", caught_by=f"{METRICS}::test_a_step_without_a_row_is_told")
def a_missing_row_is_not_noticed(original):
    """A job is taken for done though some of its steps have no row."""

    def require(self, job, steps):
        pass

    return require


@planted("lorafusion.launch.lock:_end", caught_by=f"{LOCK}::test_the_workers_of_a_killed_launcher_are_ended")
def the_workers_of_a_killed_launcher_go_on(original):
    """A new launcher does not end the workers that a killed one left running."""

    def end(processes, folder):
        pass

    return end


@planted(
    "lorafusion.launch.lock:start_of", caught_by=f"{LOCK}::test_a_process_that_has_got_a_dead_ones_id_is_left_alone"
)
def a_process_is_known_by_its_id_alone(original):
    """A process that has got a dead one's id is ended in its place."""

    class Any(int):
        """A start that is as early as any other."""

        __hash__ = int.__hash__

        def __eq__(self, other):
            return other is not None

    def start(pid):
        return None if original(pid) is None else Any(original(pid))

    return start


@planted(
    "lorafusion.launch.lock:_silent",
    caught_by=f"{LOCK}::test_who_lives_on_another_machine_is_not_disturbed[elsewhere0]",
)
def another_machines_training_is_overlooked(original):
    """A folder that another machine is using is used."""
    from lorafusion.launch import lock

    return lambda folder, path, what: {member.token for member in lock._members(path)}


@planted("lorafusion.launch.lock:join", caught_by=f"{LOCK}::test_a_worker_that_comes_late_touches_nothing")
def a_late_worker_goes_on(original):
    """A worker does not ask whether its launcher still has the folder."""
    from lorafusion.core.schema import UserError

    def join(lock):
        with suppress(UserError):
            original(lock)

    return join


@planted("lorafusion.train.export:Exporter.look", caught_by=f"{EXPORT}::test_a_job_is_exported_while_the_others_train")
def adapters_wait_for_the_last_job(original):
    """Adapters are exported when all jobs have ended."""

    def look(self, run):
        return []

    return look


@planted(
    "lorafusion.train.export:Exporter.is_done",
    caught_by=f"{EXPORT}::test_an_adapter_that_is_not_whole_is_written_again",
)
def an_exported_adapter_is_not_looked_at(original):
    """An adapter that was written once is taken to be there."""

    def is_done(self, job):
        return job.name in self.output.progress.exported

    return is_done


@planted(
    "lorafusion.train.export:Exporter._try", caught_by=f"{EXPORT}::test_one_that_cannot_be_exported_hinders_no_other"
)
def one_failed_export_ends_all(original):
    """An adapter that cannot be written keeps the others from being written."""

    def attempt(self, *arguments):
        original(self, *arguments)
        if self.failures:
            raise OSError(self.failures)

    return attempt


@planted(
    "lorafusion.train.ownership:require_names",
    caught_by="tests/train/test_names.py::test_a_name_that_no_file_can_have_is_refused_at_the_start",
)
def any_name_will_do(original):
    """A job's name is not compared with what files can be named."""

    def require_names(folder, names, source):
        pass

    return require_names


@planted("lorafusion.train.status:Status.write", caught_by=f"{STATUS}::test_it_says_running_while_it_runs")
def a_status_of_ok_stays_while_jobs_train(original):
    """status.json is written at the end alone."""

    def write(self, status, note=""):
        self.status = status
        if status != "running":
            original(self, status, note)

    return write


@planted("lorafusion.train.status:refuse", caught_by=f"{STATUS}::test_a_broken_jobs_file_leaves_no_ok_behind")
def a_broken_jobs_file_leaves_the_last_status(original):
    """status.json says nothing of a jobs file that was refused."""

    def refuse(folder, jobs_file, error):
        pass

    return refuse


@planted("lorafusion.data.store:StoreFile.require_content", caught_by="tests/data/test_store.py::test_any_bit_counts")
def tokens_are_believed(original):
    """A token store is not compared with its hash."""

    def require_content(self):
        pass

    return require_content
