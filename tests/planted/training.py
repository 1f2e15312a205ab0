"""Errors in a run's arithmetic: steps, norms, rates, what crosses stages and replicas."""

from __future__ import annotations

from tests.planted.plant import planted

RUN = "tests/lab/test_plain_training.py::test_a_run_computes_what_plain_training_computes"
ADAPTERS = "tests/engine/test_adapters.py"
EXACT = "tests/baselines/test_exact.py::test_a_system_trains_what_plain_libraries_train"


@planted("lorafusion.engine.adapters:AdapterTraining.__init__", caught_by=f"{RUN}[linear]")
def weight_decay_is_dropped(original):
    """The optimizer has no weight decay."""

    def init(adapter, stage, job):
        original(adapter, stage, job)
        for group in adapter.optimizer.param_groups:
            group["weight_decay"] = 0.0

    return init


@planted("lorafusion.core.workload:Job.learning_rate_at", caught_by=f"{RUN}[linear]")
def learning_rates_are_a_step_late(original):
    """A step has the learning rate of the one before."""
    return lambda job, step: original(job, max(step - 1, 0))


@planted(
    "lorafusion.engine.adapters:AdapterTraining._clip",
    caught_by=f"{ADAPTERS}::test_a_step_sees_the_gradient_with_at_most_the_jobs_norm",
)
def nothing_is_clipped(original):
    """Gradients are not clipped."""
    return lambda adapter, norm: None


@planted("lorafusion.engine.stream:_Stream._backward", caught_by=f"{RUN}[cosine]")
def norms_are_of_one_stage(original):
    """Each stage clips by the norm of its own part of the gradient."""

    def backward(stream, slot):
        original(stream, slot)
        if stream.norms[slot] is not None:
            stream.norms[slot] = stream.run.squared_norms(slot)

    return backward


@planted("lorafusion.engine.training:TrainingRun.update", caught_by=f"{RUN}[cosine]")
def only_the_first_stage_steps(original):
    """Stages after the first do not step their adapters."""

    def update(run, slot, squared_norms):
        if run.pipeline.is_first:
            return original(run, slot, squared_norms)
        return original(run, slot, None)

    return update


@planted("lorafusion.engine.pipeline:Pipeline.send_before", caught_by=f"{RUN}[cosine]")
def the_first_stage_has_no_gradient(original):
    """What a stage sends back to the one before it is zero."""
    return lambda pipeline, tensor: original(pipeline, tensor * 0 if tensor.dim() == 3 else tensor)


@planted("lorafusion.engine.pipeline:Pipeline.sum_over_replicas", caught_by=f"{EXACT}[lorafusion-2x2+recompute]")
def replicas_are_averaged(original):
    """Replicas have the mean of their gradients and not the sum."""

    def sum_over_replicas(pipeline, tensors):
        original(pipeline, tensors)
        for tensor in tensors:
            tensor /= pipeline.replicas

    return sum_over_replicas


@planted("lorafusion.engine.pipeline:Pipeline.sum_over_replicas", caught_by=f"{EXACT}[lorafusion-2x2+recompute]")
def replicas_train_apart(original):
    """Replicas do not add up their gradients."""
    return lambda pipeline, tensors: None


@planted(
    "lorafusion.engine.adapters:AdapterTraining.step",
    caught_by=f"{ADAPTERS}::test_a_gradient_that_is_not_finite_changes_nothing_for_good",
)
def a_gradient_that_is_not_finite_is_taken(original):
    """A gradient that is not finite does not stop its adapter."""

    def step(adapter, squared_norm):
        norm = original(adapter, squared_norm.nan_to_num(1.0, 1.0, 1.0))
        return norm

    return step


@planted("lorafusion.data.packing:BatchBuilder.label_tokens", caught_by=f"{RUN}[plain]")
def losses_are_over_all_tokens(original):
    """A global batch's loss is divided by twice its label tokens."""
    return lambda builder, adapter, batch: 2 * original(builder, adapter, batch)


@planted("lorafusion.data.packing:SampleBorders.of", caught_by=f"{RUN}[plain]")
def samples_see_each_other(original):
    """Attention takes all tokens of a microbatch as one sample."""

    def of(borders, lengths, device):
        return original.__func__(borders, [sum(lengths)], device)

    return classmethod(of)
