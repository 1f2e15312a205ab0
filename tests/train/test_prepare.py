"""From a jobs file to a workload: the base model, tokens made once, orders and splits that are always the same."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.data.encoder import PROBE, Encoder
from lorafusion.data.lengths import draw_lengths
from lorafusion.data.store import JobTokens, StoreFile
from lorafusion.model.stage import hf_config
from lorafusion.train.config import read_train_config
from lorafusion.train.prepare import base_model, prepare
from tests.tiny_tokenizer import BOS, EOS, save_tokenizer

TINY = read_model("tiny")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows(tmp_path):
    """Writes a file with `count` rows, of which row i has i + 5 tokens."""

    def write(count=10, name="rows.jsonl", letter="x"):
        lines = (json.dumps({"q": "q", "a": letter * (i + 2)}) for i in range(count))
        (tmp_path / name).write_text("\n".join(lines))
        return {"jsonl": name, "prompt": "{q}", "completion": "{a}"}

    return write


@pytest.fixture
def run(tmp_path, tokenizer):
    """Prepares a jobs file with these jobs; returns the workload."""

    def run(*jobs, folder="run", **top):
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({"model": "tiny", "output": "out", "tokenizer": tokenizer, "jobs": list(jobs)} | top)
        )
        config = read_train_config(path)
        return prepare(config, base_model(config), tmp_path / folder)

    return run


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the texts that are tokenised from here on, but for the one that every tokenizer is asked about."""
    texts = []
    encode = Encoder._encode

    def counting(self, batch, special):
        texts.extend(text for text in batch if text != PROBE)
        return encode(self, batch, special)

    monkeypatch.setattr(Encoder, "_encode", counting)
    return texts


def test_a_workload_of_text(run, rows, tmp_path, capsys):
    workload = run({"name": "a", "data": rows(), "shuffle": False, "rank": 4, "steps": 1})
    assert Workload.read(tmp_path / "run" / "workload.json") == workload
    assert workload.name == "sweep"
    (job,) = workload.jobs
    assert (job.rank, job.start, job.steps) == (4, 0, 1)
    assert [(sample.id, sample.tokens) for sample in job.samples] == [(i, i + 5) for i in range(10)]
    tokens = JobTokens(tmp_path / "run" / "data", TINY.vocab_size).tokens(job, job.samples[0])
    assert (tokens.ids[0], tokens.ids[-1], tokens.first_label) == (BOS, EOS, 2)
    assert "a: jsonl:rows.jsonl: 10 samples, 0 of them truncated; dropped 0" in capsys.readouterr().err


def test_the_order_is_drawn_once_from_the_jobs_seed(run, rows):
    data = rows(30)
    jobs = [{"name": f"seed-{seed}-{i}", "data": data, "seed": seed} for seed in (1, 2) for i in (1, 2)]
    orders = [[sample.id for sample in job.samples] for job in run(*jobs).jobs]
    assert orders[0] == orders[1] != orders[2] == orders[3]
    assert all(sorted(order) == list(range(30)) != order for order in orders)


def test_an_order_is_the_same_everywhere(run, rows):
    """Pinned: a change here changes every run that is resumed."""
    (job,) = run({"name": "a", "data": rows(6), "seed": 1, "evaluation": 0.3}).jobs
    assert [sample.id for sample in job.samples] == [0, 3, 1, 5]
    assert [sample.id for sample in job.evaluation] == [2, 4]


def test_jobs_on_the_same_data_are_evaluated_on_the_same_samples(run, rows):
    jobs = [{"name": str(seed), "data": rows(20), "seed": seed, "evaluation": 0.2} for seed in (1, 2)]
    first, second = run(*jobs, {"name": "3", "data": rows(20), "shuffle": False, "evaluation": 0.2}).jobs[:2]
    assert first.evaluation == second.evaluation
    assert len(first.evaluation) == 4
    assert {*first.samples, *first.evaluation} == {*second.samples, *second.evaluation}
    assert len({*first.samples, *first.evaluation}) == 20


def test_a_share_holds_out_one_sample_at_least(run, rows):
    (job,) = run({"name": "a", "data": rows(4), "evaluation": 0.01, "evaluate_every": 2}).jobs
    assert (len(job.samples), len(job.evaluation), job.evaluate_every) == (3, 1, 2)


def test_data_of_its_own_to_evaluate_on_comes_after_the_training_rows(run, rows, tmp_path):
    own = {"text": "notes.txt", "block": 4}
    (tmp_path / "notes.txt").write_text("abcdef")
    (job,) = run({"name": "a", "data": rows(3), "evaluation": own}).jobs
    assert sorted(sample.id for sample in job.samples) == [0, 1, 2]
    assert [tuple(sample) for sample in job.evaluation] == [(3, 4), (4, 4)]
    assert StoreFile(tmp_path / "run" / "data" / "a.safetensors").notes.training == 3


def test_a_synthetic_job_needs_neither_tokenizer_nor_store(run, tmp_path):
    data = {"synthetic": {"samples": 8, "scale": 8}}
    own = {"synthetic": {"samples": 2, "dataset": "wikisum", "scale": 8}}
    jobs = [{"name": "a", "data": data, "evaluation": own}, {"name": "b", "data": data, "evaluation": 0.25}]
    a, b = run(*jobs, tokenizer=None).jobs
    assert (a.dataset, len(a.samples), [sample.id for sample in a.evaluation]) == ("synthetic:xsum", 8, [8, 9])
    assert (len(b.samples), len(b.evaluation)) == (6, 2)
    assert not (tmp_path / "run" / "data").exists()


def test_synthetic_samples_keep_to_the_rule_too(run):
    data = {"synthetic": {"samples": 50}}
    jobs = [{"name": rule, "data": data, "max_length": 400, "too_long": rule} for rule in ("truncate", "drop")]
    lengths = [sorted(sample.tokens for sample in job.samples) for job in run(*jobs).jobs]
    drawn = sorted(draw_lengths("xsum", 50, seed=0))
    assert lengths[0] == [min(tokens, 400) for tokens in drawn]
    assert lengths[1] == [tokens for tokens in drawn if tokens <= 400] != drawn


def test_nothing_is_tokenised_again_that_has_not_changed(run, rows, tokenised, tmp_path):
    job = {"name": "a", "data": rows(), "evaluation": 0.2}
    first = run(job)
    assert len(tokenised) == 10
    written = (tmp_path / "run" / "data" / "a.safetensors").stat()
    assert run(job) == first
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    again = run(job | {"data": job["data"] | {"jsonl": "moved.jsonl"}, "seed": 7, "rank": 2, "evaluation": 0.1})
    assert len(again.jobs[0].evaluation) == 1
    assert len(tokenised) == 10
    assert (tmp_path / "run" / "data" / "a.safetensors").stat().st_mtime_ns == written.st_mtime_ns


CHANGES = {
    "the template": {"data": {"jsonl": "rows.jsonl", "prompt": "{q}!", "completion": "{a}"}},
    "the length": {"max_length": 9},
    "what is too long": {"too_long": "drop"},
    "what is learnt": {"learn_prompt": True},
    "its beginning": {"add_bos": False},
    "its end": {"add_eos": False},
    "data to evaluate on": {"evaluation": {"text": "rows.jsonl"}},
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_has_changed_is_tokenised_again(run, rows, tokenised, name):
    job = {"name": "a", "data": rows()}
    first = run(job)
    tokenised.clear()
    second = run(job | CHANGES[name])
    assert tokenised
    assert first.content_hash != second.content_hash


def test_other_text_of_the_same_length_is_another_workload(run, rows, tokenised):
    first = run({"name": "a", "data": rows(letter="x")})
    tokenised.clear()
    second = run({"name": "a", "data": rows(letter="y")})
    assert len(tokenised) == 10
    assert first.jobs[0].samples == second.jobs[0].samples
    assert first.content_hash != second.content_hash


def test_another_tokenizer_tokenises_again(run, rows, tokenised, tmp_path):
    run({"name": "a", "data": rows()})
    tokenised.clear()
    run({"name": "a", "data": rows()}, tokenizer=str(save_tokenizer(tmp_path / "other", around="$A")))
    assert tokenised


def flipped(whole: bytes) -> bytes:
    """Another token id, which is as good as any."""
    return whole[:-1] + bytes([whole[-1] ^ 1])


@pytest.mark.parametrize(
    "damaged", [lambda whole: whole[:-5], flipped, lambda whole: whole.replace(b"10 samples", b"11 samples", 1)]
)
def test_jobs_share_tokens_and_a_damaged_store_is_made_anew(run, rows, tokenised, tmp_path, damaged):
    jobs = [{"name": name, "data": rows(), "learning_rate": rate} for name, rate in (("a", 1e-4), ("b", 1e-3))]
    first = run(*jobs)
    assert len(tokenised) == 10
    data = tmp_path / "run" / "data"
    assert sorted(path.name for path in data.iterdir()) == ["a.safetensors", "b.safetensors"]
    whole = (data / "a.safetensors").read_bytes()
    assert (data / "b.safetensors").read_bytes() == whole
    (data / "a.safetensors").unlink()
    (data / "a.safetensors").write_bytes(damaged(whole))
    assert run(*jobs) == first
    assert len(tokenised) == 20
    assert (data / "a.safetensors").read_bytes() == whole


def test_a_dataset_of_the_hub_is_known_by_the_files_that_were_downloaded(run, tokenised, tmp_path, monkeypatch):
    class Dataset(list):
        cache_files = ({"filename": str(tmp_path / "train.arrow")},)

    library = SimpleNamespace(
        load_dataset=lambda *_, **__: Dataset([{"a": "xyz"}]), exceptions=SimpleNamespace(DatasetsError=RuntimeError)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    job = {"name": "a", "data": {"hub": "owner/name", "completion": "{a}"}}
    for content, texts in (("one", 1), ("one", 1), ("two", 2)):
        (tmp_path / "train.arrow").write_text(content)
        assert run(job).jobs[0].dataset.startswith("hub:owner/name/train@")
        assert len(tokenised) == texts


MISTAKES = {
    "no tokenizer": ({}, {"tokenizer": None}, "tokenizer: field required, as model 'tiny' has none of its own"),
    "more stages than layers": ({}, {"processes": 5}, "processes: 5 stages, but the model has 4 layers"),
    "more than the positions": (
        {"max_length": 9999},
        {},
        "jobs.a: max_length: 9999 tokens, but the model has 4096 pos",
    ),
    "blocks": ({"data": {"text": "rows.jsonl", "block": 5000}}, {}, "jobs.a: data.block: 5000 tokens, more than max_"),
    "nothing to train": ({"evaluation": 0.5}, {}, "jobs.a: evaluation: no sample is left to train, there are 1"),
    "a field": (
        {"data": {"jsonl": "rows.jsonl", "completion": "{b}"}},
        {},
        "rows.jsonl:1: no field 'b'; found q, a",
    ),
    "synthetic errors": (
        {"data": {"synthetic": {}}, "max_length": 9, "too_long": "error"},
        {},
        "jobs.a: synthetic:xsum: 1883 tokens, more than max_length 9",
    ),
    "synthetic drops": (
        {"data": {"synthetic": {}}, "max_length": 9, "too_long": "drop"},
        {},
        "jobs.a: synthetic:xsum: every sample is longer than max_length 9",
    ),
    "a revision of a folder": ({}, {"model": ".", "revision": "v1"}, "revision: the model is a local folder"),
}


def test_a_dataset_that_cannot_be_had_names_the_file_and_the_job(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"sweep\.yaml: jobs\.a: hub:owner/name/train: needs the package datasets"):
        run({"name": "a", "data": {"hub": "owner/name", "completion": "{a}"}})


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_names_the_file_and_the_job(run, rows, tmp_path, name):
    job, top, message = MISTAKES[name]
    data = rows(1)
    with pytest.raises(UserError) as caught:
        run({"name": "a", "data": data} | job, **top)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'sweep.yaml'}: ")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "run" / "workload.json").exists()


def test_a_token_beyond_the_models_vocabulary_is_an_error(run, rows, tmp_path):
    small = TINY.model_dump() | {"vocab_size": 256}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    with pytest.raises(UserError, match="the tokenizer gives token 257, but the model's vocabulary has 256"):
        run({"name": "a", "data": rows()}, model="small.yaml")


@pytest.fixture
def model(tmp_path):
    """The base model of a jobs file whose model is a Hugging Face folder with changes to its config.json."""

    def model(config=TINY, top=None, **changes):
        folder = tmp_path / "base"
        hf_config(config).save_pretrained(folder)
        described = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(described))
        data = {"model": "base", "output": "out", "jobs": [{"name": "a", "data": {"synthetic": {}}}]} | (top or {})
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(data))
        return base_model(read_train_config(tmp_path / "jobs.yaml"))

    return model


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.model_copy(update={"architecture": "qwen2", "tie_word_embeddings": True}),
        read_model("llama-3.1-8b"),
        read_model("qwen2.5-32b"),
    ],
    ids=["tiny", "tied", "llama3", "qwen"],
)
def test_a_hugging_face_folder_is_described_as_it_is(model, config, tmp_path):
    weights = {"weights": str(tmp_path / "base")}
    assert model(config) == config.model_copy(update=weights)
    assert model(config, {"weights": "random"}) == config.model_copy(update={"weights": "random"})


def test_an_older_checkpoints_rope_is_understood(model):
    """Before transformers 5 the base stood beside the scaling, and `rope_type` was `type`."""
    found = model(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert found.rope_parameters == {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert hf_config(found).rope_parameters["factor"] == 2.0


UNSUPPORTED = {
    "another family": ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama, qwen2"),
    "no family": ({"model_type": "nope"}, "architecture 'nope' is not supported"),
    "biases": ({"attention_bias": True}, "attention_bias is True, supported for llama is False"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported for llama is 'silu'"),
    "wider heads": ({"head_dim": 32}, "head_dim is 32, supported is 16"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is {"),
    "a bad number": ({"vocab_size": "many"}, "vocab_size: input should be a valid integer"),
    "heads that do not divide": ({"num_attention_heads": 3}, "num_attention_heads: expected a divisor of"),
}


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_an_unsupported_model_says_why(model, name):
    changes, message = UNSUPPORTED[name]
    with pytest.raises(UserError) as caught:
        model(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_described_model_can_have_another_revision_and_random_weights(model, tmp_path):
    described = TINY.model_dump() | {"weights": "owner/name"}
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(described))
    assert model(top={"model": "big.yaml", "revision": "v2"}).revision == "v2"
    assert model(top={"model": "big.yaml", "weights": "random"}).weights == "random"
    assert model(top={"model": "tiny"}) == TINY
