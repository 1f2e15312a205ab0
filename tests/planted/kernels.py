"""Errors in the LoRA linear, its masks, and mLoRA's loop of adapters."""

from __future__ import annotations

from tests.planted.plant import planted

PHILOX = "tests/fused_lora/test_philox.py"
REFERENCE = "tests/fused_lora/test_reference.py"
LOOPED = "tests/baselines/test_looped.py"
GRID = "tests/lab/experiments/test_grid.py"
REPLAY = "tests/fused_lora/gpu/test_replay.py"
MIXED = f"{REPLAY}::test_the_driver_is_told_the_same[four adapters, mixed ranks, q, k and v]"
FUNCTIONS = f"{REFERENCE}::test_the_functions_of_the_reference_are_the_linear"
DEFINITION = f"{REFERENCE}::test_forward_and_gradients_equal_autograd_of_the_definition"


@planted("fused_lora.philox:mask_key", caught_by=f"{PHILOX}::test_keys_are_the_same_everywhere")
def all_layers_have_one_mask(original):
    """The key of a dropout mask ignores the layer."""
    return lambda seed, layer, module: original(seed, 0, module)


@planted("fused_lora.philox:mask_key", caught_by=f"{PHILOX}::test_keys_are_the_same_everywhere")
def all_seeds_have_one_mask(original):
    """The key of a dropout mask ignores the seed."""
    return lambda seed, layer, module: original(0, layer, module)


@planted(
    "fused_lora.philox:words_of_threshold",
    caught_by=f"{PHILOX}::test_masks_of_other_keys_positions_and_columns_are_independent",
)
def all_tokens_have_one_mask(original):
    """A dropout mask ignores the token's position."""
    return lambda key, positions, columns, threshold: original(key, 0 * positions, columns, threshold)


@planted("fused_lora.philox:philox4x32", caught_by=f"{PHILOX}::test_known_answers")
def philox_has_a_round_less(original):
    """The random numbers are not those of Philox4x32-7."""
    return lambda counter, key, rounds=7: original(counter, key, rounds - 1)


@planted("fused_lora.philox:drop_threshold", caught_by=f"{PHILOX}::test_masks_drop_the_asked_share_evenly")
def dropout_is_a_tenth_too_high(original):
    """A dropout of p drops 1.1 p."""
    return lambda p: original(min(1.1 * p, 0.999))


@planted("fused_lora.reference:draw_masks", caught_by=FUNCTIONS)
def masks_are_those_of_the_first_token(original):
    """The masks of a segment begin at the batch's first position."""

    def draw_masks(adapters, segments, positions, *rest):
        return original(adapters, segments, positions * 0 + positions[:1], *rest)

    return draw_masks


@planted("fused_lora.reference:_factor", caught_by=FUNCTIONS)
def the_keep_factor_is_missing(original):
    """What dropout keeps is not divided by 1 - p."""
    return lambda adapter, mask: adapter.scaling


@planted("fused_lora.reference:_factor", caught_by=DEFINITION)
def the_scale_is_two_percent_up(original):
    """LoRA's scale is multiplied by 1.02."""
    return lambda adapter, mask: 1.02 * original(adapter, mask)


def _backward(change):
    """The reference's backward pass with a change to dx, da and db."""

    def replace(original):
        def lora_backward(dy, x, weight, *rest):
            return change(dy, weight, *original(dy, x, weight, *rest))

        return lora_backward

    return replace


@planted("fused_lora.reference:lora_backward", caught_by=DEFINITION)
def dx_lacks_loras_part(original):
    """The gradient of the input is that of the frozen linear alone."""
    return _backward(lambda dy, weight, dx, da, db: (dy @ weight, da, db))(original)


@planted("fused_lora.reference:lora_backward", caught_by=DEFINITION)
def da_is_two_percent_down(original):
    """The gradient of A is multiplied by 0.98."""
    return _backward(lambda dy, weight, dx, da, db: (dx, [0.98 * a for a in da], db))(original)


@planted(
    "fused_lora.reference:lora_backward", caught_by=f"{REFERENCE}::test_any_batch_equals_autograd_of_the_definition"
)
def neighbours_swap_their_gradients(original):
    """The gradients of B go to the adapters in reverse order where their shapes allow it."""

    def swapped(dy, weight, dx, da, db):
        if len({b.shape for b in db}) == 1:
            return dx, da, db[::-1]
        return dx, da, [b * 0 for b in db]

    return _backward(swapped)(original)


@planted("fused_lora.reference:gated_backward", caught_by="tests/fused_lora/test_gated.py")
def the_gates_derivative_is_a_sigmoid(original):
    """The derivative of silu lacks its second term."""

    def gated_backward(gate, up, dh):
        _, dup = original(gate, up, dh)
        return (dh * up * gate.sigmoid()).to(gate.dtype), dup

    return gated_backward


@planted("baselines.mlora.lora:_add_product", caught_by=f"{LOOPED}::test_results_and_gradients_are_those_of_autograd")
def mloras_scale_is_two_percent_down(original):
    """The looped LoRA's scale is multiplied by 0.98."""
    return lambda target, left, right, scaling: original(target, left, right, 0.98 * scaling)


@planted(
    "baselines.mlora.lora:_BatchLoRA.backward",
    caught_by=f"{LOOPED}::test_the_backward_pass_is_the_derivative_of_the_forward_pass",
)
def mloras_da_is_two_percent_down(original):
    """The looped LoRA's gradients of A are multiplied by 0.98."""

    def backward(ctx, dy):
        dx, *nothing_and_factors = original.__func__(ctx, dy)
        nothing, factors = nothing_and_factors[:3], nothing_and_factors[3:]
        return dx, *nothing, *(0.98 * g if i % 2 == 0 else g for i, g in enumerate(factors))

    return staticmethod(backward)


@planted(
    "fused_lora.linear:_form",
    caught_by="tests/fused_lora/test_arguments.py::test_a_bad_argument_is_named_in_one_line[weight is trained]",
)
def a_weight_may_be_trained_later(original):
    """Arguments that were checked are not checked again after their weight has come to need a gradient."""
    return lambda x, weights, *rest: original(x, [weight.detach() for weight in weights], *rest)


@planted("fused_lora.gpu.host.driver:_place", caught_by=MIXED)
def a_view_is_launched_from_its_beginning(original):
    """A launch that is done again takes the memory of a view from its beginning."""
    return lambda reference: (reference.slot, 0)


@planted("fused_lora.gpu.host.replay:bind", caught_by=MIXED)
def a_thread_has_no_context(original):
    """A launch that is done again in autograd's thread has no context of CUDA."""
    return lambda device: None


@planted(
    "fused_lora.gpu.host.choices:_tuned_tokens",
    caught_by="tests/fused_lora/gpu/test_choices.py::test_the_next_number_of_tokens_above_is_taken[1025-1152]",
)
def a_choice_is_that_of_the_nearest_tokens(original):
    """A launch choice is that of the nearest number of tokens, also where its tiles take a turn less."""
    from fused_lora.gpu.host.choices import _ratio

    return lambda tuned, tokens: min(tuned, key=lambda count: _ratio(count, tokens))


@planted(
    "lorafusion.lab.experiments.implementations:Builder._in_turns",
    caught_by=f"{GRID}::test_peft_computes_the_tokens_of_one_adapter_after_those_of_the_other",
)
def peft_is_timed_with_half_of_the_tokens(original):
    """In the grid PEFT computes only half of the tokens of several adapters."""
    return lambda self, case, *tensors: original(self, case.model_copy(update={"tokens": case.tokens // 2}), *tensors)


@planted(
    "lorafusion.lab.experiments.timing:_in_a_row",
    caught_by=f"{GRID}::test_the_hosts_time_is_not_that_of_a_queue_that_is_full",
)
def the_host_waits_for_the_device(original):
    """The time of the host is that of a row of calls, with its waits for the device."""
    return lambda *arguments: 2 * original(*arguments)[1:]


@planted(
    "lorafusion.lab.report.figures.grid:share_of",
    caught_by=f"{GRID}::test_the_worst_point_and_the_shares_are_those_of_the_numbers",
)
def the_worst_points_are_left_out(original):
    """Points of the grid that are beyond the limits don't count."""
    return lambda data, metric: original(data[~(data["value"] > 1.02)], metric)
