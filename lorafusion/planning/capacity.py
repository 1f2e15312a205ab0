"""What all answers to "how many tokens may a microbatch hold?" share. Who answers it, and when:

`train.planner`         a run of a jobs file: the stated capacity, else a measured one; on a CPU a fixed one
`engine.memory_probe`   measured on the GPUs before such a run, from two microbatches
`planning.memory`       counted without a GPU, to choose groups, stages and replicas
`lab.tuning`            tried, in each cell of a suite, for systems whose memory nothing here describes
"""

USABLE = 0.94  # of a GPU's memory: the driver, the libraries, the allocator's fragments and a step's own take the rest
STEP = 256  # tokens that a capacity is a multiple of


def rounded_down(tokens: float) -> int:
    """A capacity of at most so many tokens."""
    return int(tokens) // STEP * STEP
