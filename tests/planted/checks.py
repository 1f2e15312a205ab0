"""Errors in what checks rest on: what plain training once shared with what it judges, and the checks themselves."""

from __future__ import annotations

import functools

from tests.planted.plant import planted

IN_COMMON = "tests/lab/checks/test_gradients.py::test_adapters_trained_in_this_process_equal_plain_training"
ONE_STEP = "tests/lab/checks/test_gradients.py::test_a_step_in_bfloat16_has_the_gradients_of_float64"
VERIFIED = "tests/lab/experiments/test_kernel_suite.py::test_verification_sees_a_wrong_scale_and_a_wrong_gradient"
ON_GPU = "tests/gpu/test_checks_gpu.py::test_with_dropout_the_gradients_are_those_of_the_same_masks"
CHECKING = "tests/lab/checks/test_checking.py::"
STATUS_1 = f"{CHECKING}test_a_check_that_fails_ends_with_status_1_and_leaves_no_verdict"
WRONG = f"{CHECKING}test_a_check_fails_for_what_is_wrong"


# --- What was shared


@planted("fused_lora.philox:mask_key", IN_COMMON)
def masks_ignore_the_layer(original):
    """All layers of a model drop the same elements."""
    return lambda seed, layer, module: original(seed, 0, module)


@planted("fused_lora.philox:mask_key", IN_COMMON)
def masks_ignore_the_seed(original):
    """All jobs drop the same elements."""
    return lambda seed, layer, module: original(0, layer, module)


@planted("fused_lora.philox:words_of_threshold", IN_COMMON)
def one_mask_for_all_tokens(original):
    """Every token of a job has the mask of its first one."""
    return lambda key, positions, *rest: original(key, positions * 0, *rest)


@planted("lorafusion.core.workload:Job.stream_offset", IN_COMMON)
def masks_restart_each_epoch(original):
    """Within an epoch tokens are counted from its beginning, not from that of the stream."""

    def stream_offset(job, position):
        size = len(job.samples)
        return original(job, position % size if position % size else position)

    return stream_offset


@planted("lorafusion.data.packing:BatchBuilder._tokens", IN_COMMON)
def every_sample_has_the_tokens_of_the_first(original):
    """Samples differ in length alone."""
    return lambda builder, job, sample: original(builder, job, sample._replace(id=0))


@planted("lorafusion.core.workload:Job.sample_at", IN_COMMON)
def the_second_epoch_is_reversed(original):
    """From the second epoch on samples come in the opposite order."""

    def sample_at(job, position):
        epoch, index = divmod(position, len(job.samples))
        return job.samples[-1 - index] if epoch else original(job, position)

    return sample_at


@planted("lorafusion.model.stage:named_generator", IN_COMMON)
def all_jobs_start_from_the_same_a(original):
    """The first A of a job does not depend on its seed."""
    return lambda seed, name, device: original(0 if name.endswith(".lora_A") else seed, name, device)


@planted("lorafusion.core.workload:Job.scaling", IN_COMMON)
def rank_stabilised_adapters_have_the_plain_scale(original):
    """rslora is ignored."""
    return property(lambda job: job.alpha / job.rank)


@planted("lorafusion.core.workload:Job._batches_of", IN_COMMON)
def the_tail_of_an_epoch_is_dropped(original):
    """A global batch that is not full is left out."""
    return lambda job, epochs: (one for one in original(job, epochs) if len(one) == job.global_batch_size)


@planted("lorafusion.engine.training:TrainingRun.squared_norms", IN_COMMON)
def adapters_that_step_together_are_clipped_by_their_joint_norm(original):
    """The gradients of adapters that step after one microbatch have one norm."""

    def squared_norms(run, slot):
        norms = original(run, slot)
        return norms.sum().expand_as(norms).clone()

    return squared_norms


# --- What gradients show


@planted("fused_lora.reference:lora_backward", ONE_STEP)
def dx_lacks_the_part_of_lora(original):
    """The gradient of a linear's input is that of the base linear alone."""
    return lambda dy, x, weight, *rest: (dy @ weight, *original(dy, x, weight, *rest)[1:])


@planted("lorafusion.core.workload:Job.scaling", ONE_STEP)
def the_scale_is_two_percent_up(original):
    """The LoRA term is multiplied by 1.02."""
    return property(lambda job: 1.02 * original.fget(job))


@planted("fused_lora.reference:lora_backward", ONE_STEP)
def da_is_two_percent_down(original):
    """dA is multiplied by 0.98."""

    def lora_backward(*arguments):
        dx, da, db = original(*arguments)
        return dx, [0.98 * one for one in da], db

    return lora_backward


@planted("lorafusion.data.packing:SampleBorders.of", ONE_STEP)
def attention_sees_all_samples_as_one(original):
    """Attention reaches across the borders of samples."""
    return classmethod(lambda cls, lengths, device: original.__func__(cls, [sum(lengths)], device))


@planted("lorafusion.model.loss:_ChunkedCrossEntropy.backward", f"{ON_GPU}[1x1-tiny]", gpu=True)
def the_gradient_of_the_loss_is_two_percent_up_on_a_gpu(original):
    """The loss by chunks hands back 1.02 times its gradient."""

    def backward(ctx, upstream):
        return original.__func__(ctx, upstream * 1.02)

    return staticmethod(backward)


@planted("lorafusion.model.attention:_varlen", f"{ON_GPU}[1x1-tiny]", gpu=True)
def attention_sees_all_samples_as_one_on_a_gpu(original):
    """Flash attention reaches across the borders of samples."""

    def varlen(query, key, value, borders, scaling):
        return original(query, key, value, type(borders).of([sum(borders.lengths)], query.device), scaling)

    return varlen


@planted(
    "lorafusion.model.cudnn_attention:_rounded",
    "tests/model/test_attention.py::test_the_borders_of_many_samples_have_the_same_bounds",
)
def each_microbatch_has_a_plan_of_cudnn(original):
    """cuDNN makes a plan for each number of samples and each longest sample."""
    return max


@planted(
    "lorafusion.model.cudnn_attention:_causal",
    "tests/gpu/test_attention_gpu.py::test_its_error_is_that_of_flash_attention[odd-64]",
    gpu=True,
)
def cudnn_sees_the_tokens_that_follow(original):
    """cuDNN's attention is not causal."""
    return lambda *arguments: original(*arguments) | {"diagonal_band_right_bound": None}


@planted("fused_lora.gpu.host.launch:project", f"{ON_GPU}[1x1-tiny]", gpu=True)
def s_is_two_percent_up_on_a_gpu(original):
    """The projection's result is multiplied by 1.02."""

    def project(call, s):
        bits = original(call, s)
        s *= 1.02
        return bits

    return project


# --- The checks themselves


@planted("fused_lora.reference:_factor", f"{VERIFIED}[True]")
def the_reference_of_kernels_is_one_percent_up(original):
    """The scale in the operators' reference, which a CPU runs, is multiplied by 1.01."""
    return lambda *arguments: 1.01 * original(*arguments)


@planted(
    "lorafusion.lab.checks.comparison:LOSS_TOLERANCE", f"{CHECKING}test_bounds_and_arrangements_are_what_they_were"
)
def losses_may_differ_by_a_thousandth(original):
    """The bound of losses is 10,000 times as wide."""
    return 1e-3


@planted(
    "lorafusion.lab.checks.gradients:MOST_LENGTH_ERROR", f"{CHECKING}test_bounds_and_arrangements_are_what_they_were"
)
def gradients_may_be_five_percent_too_long(original):
    """The bound of the gradients' length is five times as wide."""
    return 0.05


def _passed(check):
    @functools.wraps(check)
    def always(*arguments, **options):
        result = check(*arguments, **options)
        verdict = result[0] if isinstance(result, tuple) else result
        passed = verdict.model_construct(**{**dict(verdict), "passed": True})
        return (passed, *result[1:]) if isinstance(result, tuple) else passed

    return always


@planted("lorafusion.lab.checks.lossless:lossless", f"{WRONG}[lossless-a loss by 1e-6]")
def lossless_always_passes(original):
    """`check lossless` passes whatever it finds."""
    return _passed(original)


@planted("lorafusion.lab.checks.systems:systems", f"{WRONG}[systems-a loss by 1e-6]")
def systems_always_passes(original):
    """`check systems` passes whatever it finds."""
    return _passed(original)


@planted("lorafusion.lab.checks.learning:learning", f"{CHECKING}test_learning_fails_where_nothing_is_learnt")
def learning_always_passes(original):
    """`check learning` passes whatever it finds."""
    return _passed(original)


@planted("lorafusion.lab.checks.kernels:verify", f"{CHECKING}test_kernels_fail_where_kernels_are_wrong")
def kernels_always_pass(original):
    """`check kernels` passes whatever it finds."""
    return _passed(original)


@planted("lorafusion.lab.suite:Arrangement.read", f"{CHECKING}test_lossless_looks_at_every_arrangement")
def arrangements_lose_replicas_and_recomputation(original):
    """Replicas and recomputation of an arrangement are ignored."""
    return classmethod(lambda cls, text: original.__func__(cls, text)._replace(replicas=1, recompute=False))


@planted(
    "lorafusion.lab.checks.requirements:require_checks", f"{CHECKING}test_no_figure_is_drawn_where_a_check_is_wanting"
)
def figures_ask_for_no_check(original):
    """A figure is drawn whatever the checks say."""
    return lambda folder, needed, table: None


@planted(
    "lorafusion.lab.checks.verdicts:CheckOutcome.write",
    f"{CHECKING}test_a_check_that_fails_ends_with_status_1_and_leaves_no_verdict",
)
def a_failed_check_is_written_as_any_other(original):
    """A verdict that does not hold is written where those that hold are, and the command ends well."""
    from lorafusion.lab.checks import verdicts

    return lambda outcome, path, curves=None: verdicts.write_verdict(outcome.verdict, outcome.origin, path)
