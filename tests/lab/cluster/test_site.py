"""What a cluster is, from its file and from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site, read_site, site_or_exit

EXAMPLES = sorted(Path("slurm/sites").glob("*.yaml"))


@pytest.fixture
def site_file(tmp_path):
    def write(text: str) -> dict[str, str]:
        path = tmp_path / "site.yaml"
        path.write_text(text)
        return {"LORAFUSION_SLURM_SITE": str(path)}

    return write


def test_without_a_file_a_site_says_nothing_of_its_nodes():
    assert read_site({"LORAFUSION_SLURM_SITE": ""}) == Site()
    assert Site().gpus_per_node is None


@pytest.mark.parametrize("text", ["", "# account: lab\n"])
def test_a_file_without_keys_leaves_all_to_their_defaults(site_file, text):
    assert read_site(site_file(text)) == Site()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_sites(path):
    assert read_site({"LORAFUSION_SLURM_SITE": str(path)}).gpus_per_node


def test_there_are_three_examples():
    assert [path.stem for path in EXAMPLES] == ["a100x4", "cpu", "h100x8"]


def test_the_environment_replaces_single_keys(site_file):
    file = site_file("{partition: gpu, account: lab, gpus_per_node: 4}")
    changes = {
        "LORAFUSION_SLURM_GPUS_PER_NODE": "8",
        "LORAFUSION_SLURM_ACCOUNT": "other",
        "LORAFUSION_SLURM_PARTITION": "",  # as if it were not there
        "LORAFUSION_SLURM_EXCLUSIVE": "true",
        "LORAFUSION_SLURM_BEFORE": "module load cuda\nmodule load gcc",
    }
    site = read_site(file | changes)
    assert (site.gpus_per_node, site.account, site.partition, site.exclusive) == (8, "other", "gpu", True)
    assert site.before == ["module load cuda", "module load gcc"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("gpus_pernode: 4", "{file}: gpus_pernode: unknown key (found 4); did you mean gpus_per_node?"),
        ("gpus_per_node: 0", "{file}: gpus_per_node: input should be greater than or equal to 1 (found 0)"),
        ("left_jobs: keep", "{file}: left_jobs: input should be 'cancel' or 'wait' (found 'keep')"),
        ("gpu_type: a100-80", "{file}: gpu_type: string should match pattern '^[A-Za-z0-9_.]+$' (found 'a100-80')"),
        ("account: a b", "{file}: account: string should match pattern '^[^\\s'\\\"]+$' (found 'a b')"),
        (
            "extra: --nice=5 --qos=x",
            "{file}: extra: --qos: Snakemake sets the quality of service itself; is there a key for it? "
            "(found '--nice=5 --qos=x')",
        ),
        (
            "extra: -p gpu",
            "{file}: extra: -p: Snakemake sets the partition itself; is there a key for it? (found '-p gpu')",
        ),
        ("extra: --comment='a", '{file}: extra: no closing quotation (found "--comment=\'a")'),
        ("[4]", "{file}: expected a mapping, found a list"),
    ],
)
def test_a_mistake_in_the_file_is_a_line(site_file, text, mistake):
    file = site_file(text)
    with pytest.raises(UserError) as error:
        read_site(file)
    assert str(error.value) == mistake.format(file=file["LORAFUSION_SLURM_SITE"])


def test_a_mistake_in_the_environment_names_the_variable():
    with pytest.raises(UserError) as error:
        read_site({"LORAFUSION_SLURM_SITE": "", "LORAFUSION_SLURM_POLL": "0", "LORAFUSION_SLURM_PARTITON": "gpu"})
    assert error.value.mistakes == [
        "LORAFUSION_SLURM_PARTITON: partiton: unknown key (found 'gpu'); did you mean partition?",
        "LORAFUSION_SLURM_POLL: poll: input should be greater than or equal to 1 (found '0')",
    ]


def test_what_the_plugin_does_not_set_can_be_extra():
    site = Site(extra="--nice=5 --mail-type=FAIL --export-file=x --gpu-bind=none")
    assert request_of(Resources(1, 1), site)["slurm_extra"] == site.extra


def test_a_profile_with_a_mistake_ends_in_a_line(monkeypatch, capsys):
    monkeypatch.setenv("LORAFUSION_SLURM_SITE", "nowhere.yaml")
    with pytest.raises(SystemExit) as end:
        site_or_exit()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: no such YAML file\n"


def test_a_job_begins_with_the_lines_of_the_site():
    site = Site(before=["module load cuda"], interface="ib0")
    assert site.shell == ("set -e\nmodule load cuda\nexport NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0\n")
