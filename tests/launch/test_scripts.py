"""The scripts and manifests of launch/: sound shell, the commands they compose, manifests of the published forms."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ARGUMENTS = ["--config=configs/llava15_lppo.py", "--workdir=/runs/a run", '--prompt=it\'s "odd" & $HOME\\']
JOBSET = {"NAME": "run-1", "IMAGE": "registry.example/icet:1", "CLAIM": "runs", "ACCELERATOR": "tpu-v5-lite-podslice",
          "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS": "4"}  # fmt: skip
STUB = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "describe" in sys.argv:
    print(os.environ.get("STATE", "ACTIVE"))
codes = os.environ.get("CODES_" + os.path.basename(sys.argv[0]), "0").split(",")
done = sum(json.loads(line)[0] == os.path.basename(sys.argv[0]) for line in open(os.environ["CALLS"]))
sys.exit(int(codes[min(done, len(codes)) - 1]))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script where gcloud, srun, scontrol and python3 only note how they were called."""
    for name in ("gcloud", "srun", "scontrol", "python3", "kubectl"):
        stub = tmp_path / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)

    def start(script, *arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        keep = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls), "POLL": "0"}
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=keep | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return start


def unquoted(command):
    """The words that a shell of the far side makes of a command line."""
    return subprocess.run(
        ["bash", "-c", f'show() {{ printf "%s\\0" "$@"; }}; show {command}'], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    found = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(found).exists():
        pytest.skip("shellcheck is not installed (the `test` extra has it)")
    done = subprocess.run([found, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_a_script_says_how_it_is_called(script, run):
    done, calls = run(script.name)
    assert done.returncode == 2 and not calls
    assert f"launch/{script.name} " in done.stderr and done.stdout == ""


def test_nothing_names_a_project_a_zone_or_a_bucket():
    for path in LAUNCH.iterdir():
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"(us|europe|asia)-[a-z]+\d(-[a-z])?\b|--project=[a-z]", text), path
            assert not re.search(r"(gs|s3)://(?!BUCKET|,|\))", text.replace("gs://, s3://, ...", "")), path


def test_tpu_pod_reaches_every_host_with_the_arguments_as_they_are(run):
    done, calls = run("tpu_pod.sh", "slice", "zone-a", *ARGUMENTS, PROJECT="mine")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert {"--zone=zone-a", "--project=mine", "--worker=all"} <= {*call}
    command = call[-1].removeprefix("--command=")
    assert command.startswith("cd icet-jax && exec .venv/bin/python -m icet_jax.main ")
    assert unquoted(command.partition(" -m ")[2]) == ["icet_jax.main", "--coordinator=auto", *ARGUMENTS]


@pytest.mark.parametrize(("state", "asks"), [("ACTIVE", ["describe", "describe"]), ("SUSPENDED", None)])
def test_tpu_queue_takes_up_a_request_or_makes_a_new_one(state, asks, run):
    done, calls = run("tpu_queue.sh", "slice", "zone-a", "v5litepod-16", *ARGUMENTS, VERSION="v", SPOT="1", STATE=state)
    what = [call[4] for call in calls if call[3] == "queued-resources"]
    if asks is None:  # the stub goes on saying SUSPENDED
        assert what[:3] == ["describe", "delete", "create"] and done.returncode == 1
        assert "--spot" in calls[2] and "--accelerator-type=v5litepod-16" in calls[2]
        return
    assert done.returncode == 0, done.stderr
    assert what == asks
    assert [call[4] for call in calls if call[3] == "tpu-vm"] == ["scp", "ssh", "ssh"]
    assert "'.[tpu]'" in calls[-2][-1] and "--coordinator=auto" in calls[-1][-1]


def test_slurm_puts_a_stopped_run_back(run):
    done, calls = run("slurm.sbatch", *ARGUMENTS, CODES_srun="75", SLURM_JOB_ID="42")
    assert done.returncode == 75
    assert calls == [
        ["srun", "--kill-on-bad-exit=1", "python3", "-m", "icet_jax.main", *ARGUMENTS],
        ["scontrol", "requeue", "42"],
    ]
    done, calls = run("slurm.sbatch", *ARGUMENTS, CODES_srun="2", SLURM_JOB_ID="42")
    assert done.returncode == 2 and len(calls) == 1


def test_gpus_starts_a_stopped_run_again(run):
    done, calls = run("gpus.sh", *ARGUMENTS, CODES_python3="75,75,0")
    assert done.returncode == 0 and calls == [["python3", "-m", "icet_jax.main", *ARGUMENTS]] * 3


def test_a_jobset_lacks_nothing(run):
    for missing in JOBSET:
        done, _ = run("gke_jobset.sh", *ARGUMENTS, **{name: value for name, value in JOBSET.items() if name != missing})
        assert done.returncode == 2 and f"{missing} is not set" in done.stderr and done.stdout == ""


def test_the_jobset_has_the_published_form(run):
    """The fields of the CRD jobset.x-k8s.io v1alpha2 that are used, and of the batch/v1 Job and v1 Pod inside it."""
    done, _ = run("gke_jobset.sh", *ARGUMENTS, **JOBSET)
    assert done.returncode == 0, done.stderr
    assert "@" not in done.stdout.split("spec:", 1)[1].replace('"$@"', "")
    check(yaml.safe_load(done.stdout), json.loads((Path(__file__).parent / "jobset_schema.json").read_text()), "JobSet")


def test_the_jobset_runs_the_arguments_as_they_are(run):
    done, _ = run("gke_jobset.sh", *ARGUMENTS, **JOBSET)
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] == 4
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": "4"}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    script = container["args"][0].replace("exec python3", 'printf "%s\\0"')
    words = subprocess.run(
        [*container["command"], script], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert words == ["-m", "icet_jax.main", "--coordinator=auto", *ARGUMENTS]


def test_the_skypilot_task_has_the_published_form():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    check(task, json.loads((Path(__file__).parent / "skypilot_schema.json").read_text()), "task")
    assert task["envs"] == {"RUNS": None, "ICET_ARGUMENTS": None}, "both must be given"


def test_the_skypilot_task_starts_each_node_as_one_process(run, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "run.sh").write_text(task["run"])
    (tmp_path / "python3").write_text('#!/usr/bin/env bash\nenv | grep "^JAX_"\nprintf "%s\\n" "$@"\n')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ICET_ARGUMENTS": "--config=a --workdir='/runs/a run'"} | nodes
    done = subprocess.run(
        ["bash", "-eu", tmp_path / "run.sh"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert {"JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_PROCESS_ID=1", "JAX_NUM_PROCESSES=2"} <= {*words}
    assert words[-4:] == ["-m", "icet_jax.main", "--config=a", "--workdir=/runs/a run"]


@pytest.mark.parametrize("damage", ["field", "type", "value", "missing"])
def test_a_manifest_of_another_form_is_found(damage, run):
    manifest = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    schema = json.loads((Path(__file__).parent / "skypilot_schema.json").read_text())
    if damage == "field":
        manifest["resources"]["accelerator"] = "H100"
    elif damage == "type":
        manifest["num_nodes"] = "two"
    elif damage == "value":
        manifest["file_mounts"]["/runs"]["mode"] = "MOVE"
    else:
        del manifest["run"]
    with pytest.raises(AssertionError):
        check(manifest, schema, "task")


def check(value, schema, where):
    """A few words of JSON schema: type, enum, required, properties (no others allowed), items, values."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    allowed = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    assert any(type(value) is kinds[kind] for kind in allowed), f"{where}: {value!r} is no {allowed}"
    assert value in schema.get("enum", [value]), f"{where}: {value!r} is none of {schema.get('enum')}"
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", []) if name not in value]
        assert not missing, f"{where} lacks {missing}"
        for name, part in value.items():
            inside = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            assert inside, f"{where} has no field {name}"
            check(part, inside, f"{where}.{name}")
    if isinstance(value, list):
        for number, part in enumerate(value):
            check(part, schema["items"], f"{where}[{number}]")
