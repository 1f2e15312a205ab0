"""Checks can fail, each of them; a verdict is what its file says to the letter; and no figure is drawn without them."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.lab import definitions, plain_training
from lorafusion.lab.checks import catalog, comparison, gradients, kernels, learning, lossless, systems
from lorafusion.lab.checks.toy_runs import EXACT, SINGLE, Setup, TrainingResult, setups_of, toy_jobs
from lorafusion.lab.checks.verdicts import Origin, Verdict, read_verdict, write_verdict
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.suite import Arrangement, read_suite
from lorafusion.lab.table import table as tables
from tests.cli.test_cli import lorafusion
from tests.lab.report.conftest import run as made_run
from tests.lab.report.conftest import tabulate

NEEDED = catalog.needed_by("runs")
SMOKE = CONFIGS / "suites" / "smoke.yaml"
ORIGIN = Origin(suite="smoke", device="cpu", dtype="float32", code="0123456789abcdef")
GOOD = Verdict(check="lossless", passed=True, statement="it holds", figures={"lorafusion as 1x1: error": 1e-9})


# --- Verdicts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": "no"}, "passed: input should be a valid boolean (found 'no')"),
        ({"passed": 1}, "passed: input should be a valid boolean"),
        ({"passed": None}, "passed: input should be a valid boolean"),
        ({"figures": {"error": "small"}}, "figures.error"),
        ({"origin": None}, "origin"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_verdict_is_read_to_the_letter(tmp_path, change, message):
    path = tmp_path / "lossless.json"
    write_verdict(GOOD, ORIGIN, path)
    assert read_verdict(path).model_dump() == GOOD.model_copy(update={"origin": ORIGIN}).model_dump()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        read_verdict(path)
    assert message in str(caught.value)


def test_a_verdict_that_was_changed_by_hand_is_refused(tmp_path):
    """Its figure was 1e-9, and it was about another suite."""
    path = tmp_path / "lossless.json"
    for old, new in (("1e-09", "1e-12"), ("smoke", "h200")):
        write_verdict(GOOD, ORIGIN, path)
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=r"lossless\.json: seal: found"):
            read_verdict(path)


@pytest.mark.parametrize("text", ["", "{", '{"passed": false, "passed": true}', "[]", "[" * 100_000])
def test_what_is_no_verdict_says_so(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match=r"v\.json"):
        read_verdict(tmp_path / "v.json")


# --- Figures need them


@pytest.fixture
def measured(tmp_path) -> Path:
    """The table of a suite's runs, and verdicts for it."""
    frame = tabulate([made_run(system, repeat=repeat) for system in ("lorafusion", "peft") for repeat in (1, 2)])
    frame["tree_hash"] = ORIGIN.code
    (tmp_path / "checks").mkdir()
    tables.write(frame, tmp_path / "measurements.csv", tmp_path / "measurements.parquet")
    for name in NEEDED:
        write_good(name, tmp_path / "checks" / f"{name}.json")
    return tmp_path / "measurements.csv"


def write_good(name: str, path: Path, origin: Origin = ORIGIN, **changes) -> None:
    figures = {f"{system} as 1x1: error": 1e-9 for system in ("lorafusion", "peft")}
    write_verdict(GOOD.model_copy(update={"check": name, "figures": figures} | changes), origin, path)


def draw(table: Path, *options):
    return lorafusion(
        "lab", "figure", "smoke", "end_to_end", table, "--model", "tiny", "--out", table.parent / "figure", *options
    )


def test_a_figure_is_drawn_from_a_table_whose_checks_hold(measured):
    done = draw(measured)
    assert done.returncode == 0, done.stderr
    assert (measured.parent / "figure.png").exists()


SPOILT = {
    "missing": (None, {}, "no such verdict"),
    "failed": (ORIGIN, {"passed": False}, "passed: expected True, found False"),
    "of another check": (ORIGIN, {"check": "plans"}, "check: expected"),
    "of another suite": (ORIGIN.model_copy(update={"suite": "h200"}), {}, "suite: expected smoke, found h200"),
    "of other code": (ORIGIN.model_copy(update={"code": "f" * 16}), {}, "code: expected 0123456789abcdef, found ffff"),
    "on another device": (ORIGIN.model_copy(update={"gpu_name": "NVIDIA H200"}), {}, "made on NVIDIA H200, but"),
}


@pytest.mark.parametrize("check", NEEDED)
@pytest.mark.parametrize("spoilt", list(SPOILT))
def test_no_figure_is_drawn_where_a_check_is_wanting(measured, spoilt, check):
    origin, changes, message = SPOILT[spoilt]
    path = measured.parent / "checks" / f"{check}.json"
    path.unlink()
    if origin:
        write_good(check, path, origin, **changes)
    done = draw(measured)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 400
    assert f"{check}.json" in done.stderr
    assert message in done.stderr
    assert not (measured.parent / "figure.png").exists()


@pytest.mark.parametrize("check", ["systems", "gradients"])
def test_a_check_is_about_every_system_of_the_table(measured, check):
    write_good(check, measured.parent / "checks" / f"{check}.json", figures={"lorafusion as 1x1: error": 1e-9})
    done = draw(measured)
    assert done.returncode == 2
    assert "says nothing of peft" in done.stderr


def test_a_table_of_record_that_names_no_code_is_drawn_with_checks_of_any(measured):
    frame = tables.read(measured).assign(tree_hash=None)
    tables.write(frame, measured, measured.with_suffix(".parquet"))
    assert draw(measured).returncode == 0


@pytest.mark.parametrize("figure", ["kernel_speed", "steps_speed", "contributions"])
def test_other_figures_of_measurements_need_theirs(measured, figure, tmp_path):
    model = ["--model", "tiny"] if figure == "contributions" else []
    done = lorafusion(
        "lab", "figure", "smoke", figure, measured, *model, "--out", tmp_path / "x", "--checks", tmp_path / "none"
    )
    assert done.returncode == 2
    assert "no such verdict" in done.stderr


# --- A check can fail


def right(workload, setup) -> TrainingResult:
    """What a right run leaves, without a run: plain training's."""
    return replace(plain_result(setup, workload.jobs), plan=SteppingTogether)


class SteppingTogether:
    """A plan of one microbatch after which two adapters step."""

    class _Microbatch:
        step_after = (0, 1)

    microbatches = (_Microbatch,)


def plain_result(setup: Setup, jobs) -> TrainingResult:
    key = str(setup), repr(jobs)
    if key not in CACHE:
        CACHE[key] = TRAIN_PLAINLY(jobs, setup, "float64")
    return CACHE[key]


CACHE: dict = {}
TRAIN_PLAINLY = comparison.train_plainly
WRONG = {
    "a loss by 1e-6": lambda run: replace(run, losses={n: [v * (1 + 1e-6) for v in o] for n, o in run.losses.items()}),
    "a tensor by 1e-5": lambda run: replace(run, weights={n: {k: t * (1 + 1e-5) for k, t in o.items()}
                                                          for n, o in run.weights.items()}),
    "nothing trained": lambda run: replace(run, weights={n: {k: t * ("lora_A" in k) for k, t in o.items()}
                                                         for n, o in run.weights.items()}),
}  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    """Runs that are what they should be, or what `wrong` makes of them where `when` says so; plain training once."""
    monkeypatch.setattr(comparison, "train_plainly", lambda jobs, setup, dtype: plain_result(setup, jobs))

    def wrong(change, when=lambda **_: True):
        def train(workload, system, arrangement=SINGLE, capacity=0, setup=EXACT):
            run = right(workload, setup)
            return change(run) if when(system=system, jobs=workload.jobs, **arrangement._asdict()) else run

        for module in (lossless, systems):
            monkeypatch.setattr(module, "train", train)

    return wrong


CHECKS = {
    "lossless": lambda: lossless.lossless([SINGLE])[0],
    "systems": lambda: systems.systems(["lorafusion", "mlora"], SINGLE),
}


@pytest.mark.parametrize("check", list(CHECKS))
def test_a_check_holds_for_what_is_right(made_up, check):
    made_up(lambda run: run)
    assert CHECKS[check]().passed


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("check", list(CHECKS))
def test_a_check_fails_for_what_is_wrong(made_up, check, wrong):
    made_up(WRONG[wrong])
    assert not CHECKS[check]().passed


@pytest.mark.parametrize(
    "when",
    [
        lambda stages, **_: stages == 2,
        lambda replicas, **_: replicas == 2,
        lambda recompute, **_: recompute,
        lambda jobs, **_: len(jobs) == 1,
        lambda jobs, **_: jobs[0].max_grad_norm is not None,
    ],
    ids=["stages", "replicas", "recomputed", "alone", "clipped"],
)
def test_lossless_looks_at_every_arrangement(made_up, when):
    """A run that goes wrong in one of them alone is seen; so none is left out, or run as another."""
    made_up(WRONG["a loss by 1e-6"], when)
    arrangements = [Arrangement.read(text) for text in ("1x1", "2x1", "1x2", "2x1+recompute")]
    assert not lossless.lossless(arrangements)[0].passed


def test_systems_looks_at_every_system(made_up):
    made_up(WRONG["a loss by 1e-6"], lambda system, **_: system == "mlora")
    assert not systems.systems(["lorafusion", "mlora"], SINGLE).passed


def test_learning_fails_where_nothing_is_learnt(monkeypatch):
    jobs = toy_jobs()
    flat = TrainingResult({job.name: [5.0] * 20 for job in jobs}, {job.name: {} for job in jobs})
    monkeypatch.setattr(learning, "train", lambda *_, **__: flat)
    monkeypatch.setattr(learning, "smallest_b", lambda _: 1.0)
    verdict = learning.learning()
    assert not verdict.passed
    assert list(verdict.limits.values()) == [0.5]


def test_kernels_fail_where_kernels_are_wrong(monkeypatch):
    original, suite = kernels.kernels, EXPERIMENTS["kernels"].entry_of("smoke")
    monkeypatch.setattr(kernels, "kernels", lambda problem: original(problem) | {"da": original(problem)["da"] * 1.01})
    assert not kernels.verify(suite, "smoke").passed


@pytest.mark.parametrize("name", NEEDED)
def test_a_check_that_fails_ends_with_status_1_and_leaves_no_verdict(monkeypatch, tmp_path, name):
    failed = GOOD.model_copy(update={"check": name, "passed": False})
    monkeypatch.setattr(catalog, "load", lambda *_: lambda suite: (failed, []))
    out = tmp_path / f"{name}.json"
    write_verdict(GOOD, ORIGIN, out)  # of an earlier time
    done = lorafusion("lab", "check", SMOKE, name, "--out", out)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert not out.exists()
    assert read_verdict(out.with_name(f"{name}.json.failed")).passed is False


# --- What is checked


def test_bounds_and_arrangements_are_what_they_were():
    """Loosened, a check says nothing; whoever has a reason changes it here, too."""
    assert (comparison.LOSS_TOLERANCE, comparison.WEIGHT_TOLERANCE) == (1e-7, 1e-6)
    assert (comparison.MOST_LOSS_ERROR, comparison.MOST_WEIGHT_ERROR, comparison.LOSS_ROUNDING) == (3.0, 2.0, 2**-9)
    assert learning.MOST_LAST_LOSS == 0.5
    assert (gradients.MOST_ERROR, gradients.MOST_LENGTH_ERROR) == (2.5, 0.01)
    assert {str(dtype): most for dtype, most in kernels.MOST_ERROR.items()} == {
        "torch.float32": 6.0, "torch.float16": 1.5, "torch.bfloat16": 1.5,
    }  # fmt: skip
    assert {str(dtype): most for dtype, most in kernels.MOST_SCALE_ERROR.items()} == {
        "torch.float32": 1e-5, "torch.float16": 2e-3, "torch.bfloat16": 5e-3,
    }  # fmt: skip
    assert read_suite(SMOKE).checks.lossless == ["1x1", "2x1", "4x1+recompute", "1x2", "2x2"]
    assert Setup("tiny", None, "cpu", "float64") == EXACT


def test_a_gpu_suite_is_checked_on_the_gpu_and_on_its_own_models():
    suite = read_suite(CONFIGS / "suites" / "h200.yaml")
    tiny, layers = Setup(device="cuda", dtype="bfloat16"), Setup("llama-3.1-8b", 2, "cuda", "bfloat16", 40)
    assert setups_of(suite) == [EXACT, tiny, layers]
    assert gradients.gradient_setups_of(suite) == [tiny._replace(stretch=4), layers]
    assert setups_of(read_suite(SMOKE)) == [EXACT]


def test_plain_training_takes_nothing_from_what_it_judges():
    """But the shape of a model and the fields of a job: shared code would be wrong on both sides."""
    allowed = {
        definitions: {"lorafusion.core.workload": {"Job", "Sample"}},
        plain_training: {
            "lorafusion.lab": {"definitions"},
            "lorafusion.core.config": {"ModelConfig"},
            "lorafusion.lab.definitions": {"Placed", "LabelledText"},
            "lorafusion.model.stage": {"hf_config"},
            "lorafusion.core.workload": {"Job"},
        },
    }
    fields = {"name", "rank", "alpha", "dropout", "rslora", "target_modules", "learning_rate", "weight_decay", "seed",
              "global_batch_size", "epochs", "steps", "start", "schedule", "warmup_steps", "max_grad_norm", "samples",
              "evaluation", "evaluate_every", "prompt"}  # fmt: skip
    ours = ("lorafusion", "fused_lora", "baselines")
    for module, modules in allowed.items():
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
                "lorafusion",
                "fused_lora",
                "baselines",
            ):
                assert {one.name for one in node.names} <= modules[node.module]
            if isinstance(node, ast.Import):
                assert not any(one.name.startswith(ours) for one in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "job":
                assert node.attr in fields, f"job.{node.attr} is worked out by the code that is judged"
