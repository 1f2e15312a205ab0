"""Errors in what a captured stage reads, writes and hands on."""

from tests.planted.plant import planted

GRAPHS = "tests/engine/test_graphs.py"
EQUAL = f"{GRAPHS}::test_graphs_train_what_eager_stages_train[float64]"


@planted("lorafusion.data.packing:PackedBatch.tensors", caught_by=EQUAL)
def labels_are_those_of_the_capture(original):
    """A graph learns the labels of the microbatch that it was captured with."""

    def tensors(batch):
        values = original.fget(batch)
        values[2] = values[2].clone()
        return values

    return property(tensors)


@planted("lorafusion.data.packing:_logit_rows", caught_by="tests/data/test_packing.py::"
         "test_logits_are_made_of_what_is_learnt[None]")  # fmt: skip
def logits_are_made_of_all_tokens(original):
    """Logits are made of all tokens, also of those without a label."""
    return lambda labels, prompts, tokens: None


@planted("lorafusion.data.packing:BatchBuilder.logit_rows", caught_by=f"{GRAPHS}::"
         "test_logits_of_what_is_learnt_train_the_same_bits_as_all")  # fmt: skip
def a_bucket_has_too_few_logits(original):
    """A bucket has one logit, however many tokens of its microbatches have a label."""
    return lambda builder, bucket, microbatches: 1


@planted("lorafusion.engine.graphs:_Passes.fill", caught_by=EQUAL)
def masks_are_those_of_the_capture(original):
    """Dropout masks of a graph are those of the tokens that it was captured with."""

    def fill(passes, batch, x):
        positions = passes.batch.positions.clone()
        original(passes, batch, x)
        passes.batch.positions.copy_(positions)

    return fill


@planted("lorafusion.engine.graphs:_Replay.forward", caught_by=f"{GRAPHS}::"
         "test_what_a_pass_gives_is_not_what_the_next_one_writes")  # fmt: skip
def what_a_replay_leaves_is_given_away(original):
    """A stage sends the memory that its next replay writes over."""

    def forward(ctx, passes, *arguments):
        original(ctx, passes, *arguments)
        return passes.out.detach()

    return staticmethod(forward)


@planted("lorafusion.engine.graphs:StageGraphs.__init__", caught_by=f"{GRAPHS}::"
         "test_each_microbatch_in_flight_has_its_own_memory")  # fmt: skip
def microbatches_in_flight_share_memory(original):
    """All microbatches in flight keep their activations in one pool."""

    def init(graphs, *arguments):
        *others, recorder = arguments
        pool = recorder.pool()
        recorder.pool = lambda: pool
        original(graphs, *others, recorder)

    return init


@planted("lorafusion.engine.graphs:_tokens_and_adapter", caught_by=f"{GRAPHS}::"
         "test_graphs_train_what_eager_stages_train[PEFT]")  # fmt: skip
def adapters_of_peft_share_their_graphs(original):
    """A graph that holds the weights of one adapter is replayed for all."""

    def key(batch):
        return original(batch)[0], 0

    return key
