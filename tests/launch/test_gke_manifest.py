import shlex

import pytest
import yaml
from fake_commands import LAUNCH, Machine, refused

RUN = {
    "NAME": "run",
    "IMAGE": "host/x:1",
    "GENERATION": "v5e",
    "TOPOLOGY": "4x4",
    "BUCKET": "gs://bucket/team/runs",
}
SPEECH = [
    "--config=configs/shapes.py",
    '--config.prompts.negative=it\'s a "bad" & c|d \\ ${NAME}: #1',
    "- x: ä",
]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, "kubectl")


def manifest(machine, *words, **settings):
    done = machine.run("gke.sh", "render", *words, "--", *SPEECH, **{**RUN, **settings})
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def job(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(jobset):
    return job(jobset)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("generation", "topology", "accelerator", "hosts", "chips"),
    [
        ("v5e", "1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e", "2x4", "tpu-v5-lite-podslice", 2, 4),
        ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p", "2x2x2", "tpu-v5p-slice", 2, 4),
        ("v6e", "4x4", "tpu-v6e-slice", 4, 4),
        ("v4", "2x2x1", "tpu-v4-podslice", 1, 4),
    ],
)
def test_one_pod_for_each_host_of_the_slice(machine, generation, topology, accelerator, hosts, chips):
    made = manifest(machine, GENERATION=generation, TOPOLOGY=topology)
    spec = job(made)
    assert spec["parallelism"] == spec["completions"] == hosts and spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    resources = container(made)["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_the_manifest_is_a_jobset_of_slices(machine):
    made = manifest(machine, "--slices=3", NAMESPACE="team", SERVICE_ACCOUNT="writer")
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["name"] == "run" and made["metadata"]["namespace"] == "team"
    (replicated,) = made["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 3
    assert job(made)["template"]["spec"]["serviceAccountName"] == "writer"


def test_75_and_signals_restart_all_hosts_and_mistakes_end_the_run(machine):
    made = manifest(machine, "--restarts=7")
    failure = made["spec"]["failurePolicy"]
    assert failure["maxRestarts"] == 7
    (rule,) = failure["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = job(made)
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    disruption, mistake = spec["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Count"
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert mistake["action"] == "FailJob"
    codes = mistake["onExitCodes"]
    assert (codes["operator"], codes["containerName"]) == ("NotIn", container(made)["name"])
    assert 75 in codes["values"] and not {0, 1, 2, 3, 4, 5, 6} & set(codes["values"])


def test_the_arguments_arrive_unchanged(machine):
    made = container(manifest(machine))
    assert made["command"] == ["python", "-m", "smart_grpo_jax.main"]
    assert made["args"] == [*SPEECH, "--workdir=/mnt/runs/run"]


def test_the_bucket_is_mounted_where_the_run_folder_is(machine):
    made = manifest(machine, "--runs=/data")
    pod = job(made)["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    csi = next(volume["csi"] for volume in pod["spec"]["volumes"] if "csi" in volume)
    assert csi["driver"] == "gcsfuse.csi.storage.gke.io"
    options = csi["volumeAttributes"]["mountOptions"].split(",")
    assert csi["volumeAttributes"]["bucketName"] == "bucket"
    assert {"only-dir:team/runs", "metadata-cache:ttl-secs:0", "file-system:rename-dir-limit:100000"} <= set(
        options
    )
    assert {"name": "runs", "mountPath": "/data"} in container(made)["volumeMounts"]
    assert container(made)["args"][-1] == "--workdir=/data/run"


def test_spot_machines_are_chosen_only_when_asked(machine):
    label = "cloud.google.com/gke-spot"
    assert label not in job(manifest(machine))["template"]["spec"]["nodeSelector"]
    assert job(manifest(machine, SPOT="true"))["template"]["spec"]["nodeSelector"][label] == "true"


def test_nothing_of_the_template_is_left_open(machine):
    done = machine.run("gke.sh", "render", "--", "--config=x", **RUN)
    assert "${" not in done.stdout and "#" not in done.stdout
    assert yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())["kind"] == "JobSet"


def test_apply_sends_what_a_dry_run_prints(machine):
    printed = machine.run("gke.sh", "apply", "--dry-run", "--", *SPEECH, **RUN)
    assert machine.calls() == []
    assert machine.run("gke.sh", "apply", "--context=c", "--", *SPEECH, **RUN).returncode == 0
    (call,) = machine.calls()
    assert call[:-1] == ["kubectl", "--namespace=default", "--context=c", "apply", "-f", "-"]
    assert call[-1] == printed.stdout


@pytest.mark.parametrize("command", ["status", "logs", "delete"])
def test_the_other_commands_print_the_very_calls(machine, command):
    printed = machine.run("gke.sh", command, "--dry-run", **RUN)
    assert machine.calls() == [] and printed.returncode == 0
    assert machine.run("gke.sh", command, **RUN).returncode == 0
    assert [shlex.split(line) for line in printed.stdout.splitlines()] == machine.calls() != []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"NAME": ""}, "NAME: is not set"),
        ({"NAME": "My_run"}, "NAME: got My_run"),
        ({"NAME": "x" * 41}, "NAME: got 41"),
        ({"IMAGE": ""}, "IMAGE: is not set"),
        ({"GENERATION": "v9"}, "GENERATION: got v9"),
        ({"TOPOLOGY": "4by4"}, "TOPOLOGY: got 4by4"),
        ({"TOPOLOGY": "2x2x2"}, "TOPOLOGY: got 2x2x2 for v5e"),
        ({"CHIPS": "3"}, "CHIPS: got 3"),
        ({"BUCKET": "bucket"}, "BUCKET: got bucket"),
        ({"SPOT": "maybe"}, "SPOT: got maybe"),
        ({"RUN_AS": "root"}, "RUN_AS: got root"),
        ({"SLICES": "none"}, "SLICES: got none"),
    ],
)
def test_mistakes_are_one_line_before_any_call(machine, settings, says):
    assert says in refused(machine.run("gke.sh", "apply", "--", "--config=x", **{**RUN, **settings}))
    assert machine.calls() == []
