"""The kernels on a GPU: against float64, twice the same bits, in CUDA graphs, under torch.compile and under PEFT."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRALinear, LoRASegment, LoRASettings, lora_linears
from fused_lora.gpu.host import choices, launch
from fused_lora.gpu.host.calls import Call, launching
from fused_lora.gpu.host.passes import draw_masks
from fused_lora.gpu.sm90 import gemms
from fused_lora.linear import operator_arguments
from fused_lora.philox import keep_mask, unpack
from lorafusion.lab.checks.kernels import MOST_ERROR, MOST_SCALE_ERROR, errors, kernels, random_problem, reference
from lorafusion.lab.experiments.timing import own_stream, prepared

GPU = torch.device("cuda")
# (in, out, tokens, rank): whole tiles, odd sizes, fewer rows than a tile, rows that the copy engine cannot fetch.
SHAPES = [(512, 384, 1024, 16), (1027, 515, 777, 5), (96, 1000, 33, 40), (256, 136, 2, 1), (640, 320, 300, 128)]


# Whose GEMM: ours wherever it can take the operands, which elements of 32 bits and odd sizes are not.
GEMMS = {
    "library": {"gemm": choices.LIBRARY},
    "ours": choices.own_gemm(),
    "ours, four slices": choices.own_gemm(slices=4, stores=2, group=3),
    "ours, whole tiles": choices.own_gemm(slices=1, slots=3),
}


def with_gemm(settings):
    """The choices, with one GEMM for all shapes."""

    def choose(kernel, shape, target):
        return settings if kernel in choices.GEMMS else choices.defaults(kernel, shape, target)

    return launching(choose=choose)


def skip_unless_sm_90(reason):
    if torch.cuda.get_device_capability() != choices.OWN_CAPABILITY:
        pytest.skip(reason)


@pytest.fixture
def of_our_gemm(monkeypatch):
    """How often our GEMM was launched."""
    skip_unless_sm_90("our GEMM is for sm_90")
    launches = []
    for name in ("output_gemm_kernel", "input_gemm_kernel"):
        kernel = getattr(gemms, name)
        monkeypatch.setattr(kernel, "run", lambda *args, _run=kernel.run, **kw: launches.append(1) or _run(*args, **kw))
    return launches


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one adapter", "five adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_close_to_float64_as_eager(shape, dtype, mixed, gemm):
    if gemm != "library":
        skip_unless_sm_90("our GEMM is for sm_90")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    problem = random_problem(*shape, mixed, GPU, dtype, seed=1)
    with with_gemm(GEMMS[gemm]):
        found = errors(problem)
    # One pass over few elements may be unlucky; a wrong element is far beyond.
    slack = 1.5 if problem.x.numel() < 2**18 else 1.0
    assert found.pop("LoRA term") <= MOST_SCALE_ERROR[dtype] * slack * 2
    assert max(found.values()) <= MOST_ERROR[dtype] * slack, found


def test_our_gemm_is_what_runs(of_our_gemm):
    with with_gemm(GEMMS["ours"]):
        kernels(random_problem(512, 384, 300, 16, True, GPU, torch.bfloat16, seed=1))
    assert len(of_our_gemm) == 2


@pytest.mark.parametrize("linears", [1, 2, 3, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_our_gemm_for_linears_that_share_their_input(linears, dropout, factors):
    """dx in one product for all, with the masks of each; the library's, one after the other, is the reference. One
    adapter has no factors on the first linear, and its s there is nothing but zeros."""
    skip_unless_sm_90("our GEMM is for sm_90")
    generator = torch.Generator(GPU).manual_seed(7)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=GPU, generator=generator) * scale).bfloat16()

    tokens, columns, widths, ranks = 700, 384, (512, 136, 264, 72)[:linears], (16, 40)
    x, weights = normal(tokens, columns).requires_grad_(), [normal(n, columns, scale=0.05) for n in widths]
    rows = [[LoRAAdapter(normal(r, columns, scale=0.05).to(factors), normal(n, r).to(factors), 1.5, dropout, 9 * i + g)
             for g, r in enumerate(ranks)] for i, n in enumerate(widths)]  # fmt: skip
    rows[0][1] = None
    segments = [LoRASegment(0, 131, 1), LoRASegment(131, 131, 0), LoRASegment(140, 700, 0)]
    batch, dys = LoRABatch.of(segments, torch.arange(tokens, device=GPU)), [normal(tokens, n) for n in widths]
    found = {}
    for name in ("library", "ours"):
        with with_gemm(GEMMS[name]):
            ys = lora_linears(x, weights, [None] * linears, rows, batch)
            found[name] = [*ys, *torch.autograd.grad(ys, [x], dys)]
    for ours, expected in zip(found["ours"], found["library"], strict=True):
        assert (ours - expected).float().norm() <= 5e-3 * expected.float().norm()


@pytest.mark.parametrize("mixed", [False, True])
def test_twice_the_same_bits(mixed):
    problem = random_problem(1024, 2048, 3001, 16, mixed, GPU, torch.bfloat16, seed=2)
    first = kernels(problem)
    for _ in range(3):
        for name, tensor in kernels(problem).items():
            assert torch.equal(tensor, first[name]), name


def test_masks_are_bitwise_those_of_the_reference():
    factors = torch.zeros(4, 4099, device=GPU), torch.zeros(8, 4, device=GPU)
    adapters = [[LoRAAdapter(*factors, 1.0, 0.3, 2**64 - 5)]]
    table, positions = AdapterTable.of(adapters, GPU), torch.arange(513, device=GPU) * 7 + 2**34
    batch = LoRABatch.of([LoRASegment(0, 513, 0)], positions)
    x = torch.zeros(513, 4099, device=GPU, dtype=torch.bfloat16)
    call = Call(*operator_arguments(adapters, batch, table, training=True), x, [x[:8]])
    ours = unpack(draw_masks(call)[0], 4099)
    assert torch.equal(ours, keep_mask(2**64 - 5, positions, 4099, 0.3))


# tokens, columns, ranks of each linear's adapters, dropout, dtype: one tile and many, odd sizes, several linears, as
# many ranks as there may be, fewer tokens than fill the GPU, one word of masks, many segments.
PROJECTIONS = [
    (8192, 4096, [[16]], 0.1, torch.bfloat16),
    (1, 64, [[16]], 0.1, torch.bfloat16),
    (777, 1032, [[16, 5, 16, 40]], 0.1, torch.bfloat16),
    (333, 44, [[8, 2, 8, 1]], 0.5, torch.float16),
    (2048, 4096, [[16], [16], [16]], 0.1, torch.bfloat16),
    (700, 520, [[40, 13, 40, 7], [40, 13, 2, 7]], 0.3, torch.float16),
    (900, 256, [[128, 66, 128, 9]], 0.1, torch.bfloat16),
    (500, 2048, [[16, 5, 16, 16]] * 4, 0.1, torch.bfloat16),
    (300, 32, [[16, 5, 16, 16]], 0.1, torch.bfloat16),
    (4000, 520, [[4, 16] * 100], 0.1, torch.bfloat16),
    (9000, 512, [[32] * 16] * 2, 0.1, torch.bfloat16),
    (777, 1032, [[16, 5, 16, 40]], 0.0, torch.bfloat16),
]


@pytest.mark.parametrize("places", ["each token's place", "the first token's place"])
@pytest.mark.parametrize(("tokens", "columns", "ranks", "dropout", "dtype"), PROJECTIONS)
def test_the_pass_that_draws_masks_equals_two_kernels(monkeypatch, tokens, columns, ranks, dropout, dtype, places):
    """Equal bits, and s to a rounding, as its sums are in another order."""
    skip_unless_sm_90("the pass is for sm_90")
    generator = torch.Generator(GPU).manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, device=GPU, generator=generator).to(dtype)

    adapters = [[LoRAAdapter(normal(r, columns) * columns**-0.5, normal(64, r), 1.5 + g, dropout, 2**63 + g + 1000 * i)
                 for g, r in enumerate(row)] for i, row in enumerate(ranks)]  # fmt: skip
    count = len(ranks[0])
    borders = [tokens * i // count for i in range(count + 1)]
    if count == 4:
        borders[1:4] = [tokens // 3, tokens // 3, tokens // 3 + 1]
    positions = torch.arange(tokens if places == "each token's place" else 1, device=GPU) + 2**33
    segments = [LoRASegment(*span, i) for i, span in enumerate(itertools.pairwise(borders))]
    batch = LoRABatch.of(segments, positions)
    weights, table = [normal(64, columns) for _ in ranks], AdapterTable.of(adapters, GPU)
    call = Call(*operator_arguments(adapters, batch, table, training=True), normal(tokens, columns), weights)
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(launch, "draws_while_projecting", lambda *_, at_once=at_once: at_once)
        s = torch.full((len(ranks), tokens, call.width), float("nan"), device=GPU, dtype=dtype)
        found.append((launch.project(call, s), s))
    (bits, s), (expected_bits, expected_s) = found
    assert torch.equal(bits, expected_bits)
    assert s.isfinite().all()
    assert (s - expected_s).float().abs().max() <= 1e-2 * expected_s.float().abs().max()


@pytest.mark.parametrize("kept", [True, False], ids=["bits kept", "bits drawn again"])
def test_grouped_equals_separate(kept):
    """q, k and v in one operation: the same outputs, and gradients to x that add up."""
    generator = torch.Generator(GPU).manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, device=GPU, generator=generator).bfloat16()

    x, widths = normal(1000, 512), (512, 128, 136)
    weights = [normal(width, 512) * 0.05 for width in widths]
    factors = [((normal(16, 512) * 0.05).requires_grad_(), normal(width, 16).requires_grad_()) for width in widths]
    rows = [[LoRAAdapter(*pair, 2.0, 0.1, 9 * i)] for i, pair in enumerate(factors)]
    dys = [normal(1000, width) for width in widths]
    batch = LoRABatch.of([LoRASegment(0, 1000, 0)], torch.arange(1000, device=GPU))
    leaves = [x.requires_grad_(), *itertools.chain.from_iterable(factors)]
    grouped = lora_linears(x, weights, [None] * 3, rows, batch, keep_bits=kept)
    separate = [lora_linears(x, [w], [None], [row], batch)[0] for w, row in zip(weights, rows, strict=True)]
    for ours, alone in zip(grouped, separate, strict=True):  # s may be summed in other parts, and round otherwise
        assert (ours - alone).float().norm() <= 2e-3 * alone.float().norm()
    ours, alone = (torch.autograd.grad(ys, leaves, dys) for ys in (grouped, separate))
    for first, second in zip(ours[1:], alone[1:], strict=True):
        assert (first - second).float().norm() <= 2e-3 * second.float().norm()
    assert (ours[0] - alone[0]).float().norm() <= 6e-3 * alone[0].float().norm()


def test_a_graph_draws_new_masks_at_each_replay():
    layer = LoRALinear(torch.nn.Linear(256, 192, bias=False), [LoRASettings(8, 16.0, 0.5)]).to(GPU, torch.bfloat16)
    torch.nn.init.normal_(layer.lora_b[0])
    x = torch.randn(300, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(300, 192, device=GPU, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(layer(x), [x, *layer.lora_a, *layer.lora_b], dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.lora_a, *layer.lora_b], dy)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([y.detach().clone(), *(one.clone() for one in gradients)])
    for first, second in itertools.combinations(seen, 2):
        for one, other in zip(first, second, strict=True):
            assert one.isfinite().all()
            assert not torch.equal(one, other)


def test_a_batch_may_be_overwritten_between_replays():
    """Other borders, other adapters and other positions in the same graph, as a trainer fills its static buffers."""
    problem = random_problem(256, 192, 640, 16, True, GPU, torch.bfloat16, seed=4)
    table = AdapterTable.of([problem.adapters], GPU)
    first = [LoRASegment(0, 300, 0), LoRASegment(300, 640, 3)]
    second = [LoRASegment(0, 11, 2), LoRASegment(11, 639, 0)]

    def run(batch):
        with torch.no_grad():
            return lora_linears(problem.x, [problem.weight], [None], [problem.adapters], batch, table=table)[0]

    static = LoRABatch.of(first, problem.positions.clone())
    run(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(static)
    other = LoRABatch.of(second, problem.positions + 1000)
    other = replace(other, offsets=other.offsets[:3], adapters=other.adapters[:2])
    for target, source in zip(vars(static).values(), vars(other).values(), strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run(other))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_dx_is_done_when_the_pass_beside_it_ends_first(captured):
    """dx sums over 28672 outputs for long after the pass over 64 columns of x, and what reads it must wait. da too must
    be right: a of rank 8 is padded for the GEMM, in memory that the pass beside it must not be given."""
    skip_unless_sm_90("our GEMM is for sm_90")
    problem = random_problem(64, 28672, 8192, 8, False, GPU, torch.bfloat16, seed=6)
    adapters = [replace(one, a=one.a.requires_grad_(), b=one.b.requires_grad_()) for one in problem.adapters]
    table, batch = AdapterTable.of([adapters], GPU), LoRABatch.of(problem.segments, problem.positions)
    x, dy = problem.x.requires_grad_(), problem.dy.clone()

    def run():
        [y] = lora_linears(x, [problem.weight], [None], [adapters], batch, table=table)
        dx, da, _ = torch.autograd.grad(y, [x, adapters[0].a, adapters[0].b], dy)
        return dx.clone(), da

    with with_gemm(GEMMS["ours"]):
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
        for scale in (1.0, -3.0, 0.5):  # what the memory of dx holds from before is wrong
            dy.copy_(scale * problem.dy)
            if captured:
                graph.replay()
            else:
                result = run()
            wanted = reference(replace(problem, dy=dy))
            for name, found in zip(("dx", "da"), result, strict=True):
                assert (found - wanted[name]).float().norm() <= 1e-2 * wanted[name].float().norm(), name


def test_a_timed_graph_keeps_what_its_function_reads():
    class Owner:
        def __init__(self):
            self.borders = torch.tensor([0, 8192], device=GPU)
            self.found = torch.zeros(2, device=GPU, dtype=torch.int64)

        def run(self):
            self.found.copy_(self.borders)

    owner = Owner()
    found = owner.found
    with own_stream(GPU):
        replay = prepared(owner.run, GPU)
    del owner
    others = [torch.full((2,), 99, device=GPU) for _ in range(100)]
    found.zero_()
    replay()
    assert found.tolist() == [0, 8192], len(others)


def test_a_compiled_model_equals_eager():
    problem = random_problem(256, 192, 640, 16, True, GPU, torch.bfloat16, seed=5)
    table, batch = AdapterTable.of([problem.adapters], GPU), LoRABatch.of(problem.segments, problem.positions)
    x = problem.x.requires_grad_()

    def function(x):
        [y] = lora_linears(x, [problem.weight], [None], [problem.adapters], batch, table=table)
        return torch.nn.functional.silu(y).sum()

    compiled = torch.compile(function, fullgraph=True)
    [ours], [eager] = (torch.autograd.grad(run(x), [x]) for run in (compiled, function))
    assert (ours - eager).float().norm() <= 1e-2 * eager.float().norm()


def test_a_patched_peft_model_trains():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fused_lora import patch

    config = LlamaConfig(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=200)  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(config).to(GPU, torch.bfloat16),
        LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
    ).train()
    summary = patch(model)
    assert len(summary.patched) == 14
    ids = torch.randint(0, 200, (2, 65), device=GPU)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_compute_sanitizer_finds_nothing(tmp_path):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "small.py"
    script.write_text(
        "import torch\n"
        "from lorafusion.lab.checks.kernels import kernels, random_problem\n"
        "for shape in ((256, 136, 130, 16), (67, 45, 33, 5)):\n"
        "    kernels(random_problem(*shape, True, torch.device('cuda'), torch.bfloat16, 1))\n"
        "torch.cuda.synchronize()\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "7", "--kernel-name-exclude", "kns=at::", sys.executable,
         str(script)],
        capture_output=True, text=True, timeout=280, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's runtime")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "done" in done.stdout
