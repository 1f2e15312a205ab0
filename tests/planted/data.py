"""Errors in what is made of a user's text, in how long a job is trained, and in what is done to a user's files."""

from __future__ import annotations

from tests.planted.plant import planted

JOINED, TEXT = "tests/data/test_joined.py", "tests/data/test_text.py"
STEPS, ADAPTERS = "tests/train/test_steps.py", "tests/engine/test_adapters.py"
OUTPUTS, FOLDER, PUBLISHED = (
    "tests/cli/test_outputs.py",
    "tests/train/test_ownership.py",
    "tests/lab/report/test_published.py",
)
ONCE = f"{JOINED}::test_what_a_chat_template_rendered_has_its_special_tokens_once[bytes-<s> $A]"


@planted(
    "lorafusion.data.text:_joined", caught_by=f"{JOINED}::test_no_blank_is_learnt_that_is_not_in_the_data[f(-seven)]"
)
def prompt_and_completion_are_tokenised_apart(original):
    """Prompt and completion are tokenised each by itself."""

    def joined(texts, encoder, specials, most):
        from lorafusion.data.text import Encoded

        for text in texts:
            parts = [text.whole[: text.border], text.whole[text.border :]]
            prompt, completion = (tokens.ids for tokens in encoder.tokenised(parts))
            before = [*specials.before, *prompt]
            yield Encoded([*before, *completion, *specials.after], len(before))

    return joined


@planted("lorafusion.data.text:_joined", caught_by=f"{JOINED}::test_a_token_that_spans_the_border_is_learnt")
def the_border_is_one_token_late(original):
    """The first token of a completion is not learnt."""

    def joined(*arguments):
        for whole in original(*arguments):
            yield whole._replace(first_label=whole.first_label + 1)

    return joined


@planted("lorafusion.data.encoder:begins_with", caught_by=ONCE)
def a_text_gets_a_second_beginning(original):
    """A text that begins with its special token gets another one."""
    return lambda specials, ids: False


@planted("lorafusion.data.encoder:ends_with", caught_by=ONCE)
def a_text_gets_a_second_end(original):
    """A text that ends with its special token gets another one."""
    return lambda specials, text, tokens: False


@planted("lorafusion.data.blocks:_as_text", caught_by=f"{TEXT}::test_fields_that_are_no_strings_are_put_in_as_json")
def fields_are_pythons_words(original):
    """Objects, lists and true are put into a template as Python writes them."""
    return lambda value, where: str(value)


@planted(
    "lorafusion.data.blocks:is_blank",
    caught_by=f"{JOINED}::test_empty_blank_and_null_completions_are_dropped_and_counted",
)
def empty_completions_are_samples(original):
    """A row with an empty completion becomes a sample."""
    return lambda template, row: None in row.values()


@planted(
    "lorafusion.core.files:_no_number", caught_by=f"{TEXT}::test_a_bad_row_is_named_by_file_and_line[not a number]"
)
def not_a_number_is_a_word(original):
    """NaN in a row is trained as a word."""
    return str


@planted("lorafusion.data.plain_text:_joint", caught_by=f"{JOINED}::test_a_long_text_is_tokenised_as_a_whole")
def parts_of_a_text_are_tokenised_apart(original):
    """A text that is read in parts is cut where a part ends."""
    return lambda held, window, tokens: (len(held), None)


@planted("lorafusion.data.plain_text:_windows", caught_by=f"{JOINED}::test_a_long_text_is_tokenised_as_a_whole")
def parts_of_a_text_share_nothing(original):
    """A text that is read in parts is tokenised part by part."""

    def windows(path):
        end = 0
        for window in original(path):
            piece = window.text[end - window.start :]
            yield window._replace(start=end, text=piece, shared=end + len(piece))
            end += len(piece)

    return windows


@planted("lorafusion.train.prepare:_duration", caught_by=f"{STEPS}::test_steps_are_made_as_asked_for_or_it_is_said")
def steps_are_cut_by_one_epoch(original):
    """A job that asks for 500 steps and no epochs makes those of one epoch."""

    def duration(config, job, samples):
        epochs = job.epochs or 1
        return epochs, original(config, job.model_copy(update={"epochs": epochs}), samples)[1]

    return duration


@planted(
    "lorafusion.core.workload:Job.learning_rate_at", caught_by=f"{STEPS}::test_a_warm_up_that_never_ends_is_refused"
)
def a_warm_up_is_a_step_longer(original):
    """The learning rate reaches its height one step late."""
    return lambda job, step: original(job, max(0, step - 1))


@planted(
    "lorafusion.engine.adapters:_in_float32",
    caught_by=f"{ADAPTERS}::test_a_float16_adapter_is_trained_as_a_float32_one_is",
)
def moments_are_in_float16(original):
    """The moments of a float16 adapter are in float16."""
    return lambda part: part


@planted(
    "lorafusion.train.export:export",
    caught_by=f"{STEPS}::test_a_revision_in_the_hubs_cache_is_trained_and_named[v2-64]",
)
def the_revision_is_not_exported(original):
    """An exported adapter names its base without the revision."""

    def export(job, model, *arguments, **options):
        return original(job, model.model_copy(update={"revision": None}), *arguments, **options)

    return export


@planted(
    "lorafusion.core.files:require_outputs",
    caught_by=f"{OUTPUTS}::test_a_figure_does_not_replace_the_curves_it_is_drawn_from",
)
def outputs_are_not_looked_at(original):
    """A command replaces what it reads."""
    return lambda outputs, inputs: None


@planted(
    "lorafusion.core.files:require_replaceable",
    caught_by=f"{OUTPUTS}::test_a_file_is_not_written_over_something_else_by_any_code[pipe]",
)
def a_pipe_is_replaced(original):
    """A file is written in the place of a pipe or a device."""
    return lambda path: None


@planted(
    "lorafusion.core.files:_place",
    caught_by=f"{OUTPUTS}::test_an_output_that_would_cost_something_is_refused[plan-its input, over a folder that is "
    "not there]",
)
def an_output_is_looked_for_before_its_folders_are_there(original):
    """A command replaces its own input, which is named over a folder that is still to be made."""
    return lambda path: path


@planted(
    "lorafusion.train.ownership:require_own",
    caught_by=f"{FOLDER}::test_a_folder_with_the_jobs_file_is_no_output[jobs.yaml]",
)
def any_folder_is_trained_into(original):
    """A training writes into a folder with a user's files."""
    return lambda config: None


@planted("lorafusion.train.ownership:_links", caught_by=f"{FOLDER}::test_nothing_is_written_through_a_link[data]")
def links_are_followed(original):
    """A training writes through a link to a user's folder."""
    return lambda folder: ()


@planted(
    "lorafusion.lab.report.published:require_own",
    caught_by=f"{PUBLISHED}::test_what_is_linked_from_a_publication_is_not_followed",
)
def any_folder_is_published_to(original):
    """A publication replaces a folder with a user's files."""
    return lambda folder, manifest: None


@planted(
    "lorafusion.lab.report.published:_described", caught_by=f"{PUBLISHED}::test_a_file_that_was_changed_since_is_kept"
)
def changed_files_are_replaced(original):
    """A file of a publication that a user has changed is deleted."""
    return lambda path: "file"
