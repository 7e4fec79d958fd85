"""Kubeflow's training operator: a PyTorchJob, or an MPIJob (both ``kubeflow.org/v1``)."""

from __future__ import annotations

from typing import Any

import yaml

from dualtok.launch.job import Job, Start

CACHE = "/cache"
Json = dict[str, Any]
HAND_ON = """\
# mpirun hands USR1 to the ranks, which write a checkpoint and end; at TERM it would kill them within seconds.
"$@" &
trap 'kill -USR1 "$!"' TERM
status=0
wait "$!" || status=$?
while kill -0 "$!" 2>/dev/null; do # a signal ends `wait` before the job
  status=0
  wait "$!" || status=$?
done
exit "$status"
"""
"""What the launcher pod of an MPIJob runs ``mpirun`` with."""


def k8s(job: Job) -> Start:
    """Return the manifest and the command that gives it to the cluster."""
    kind = job.settings.k8s.kind
    name = f"{kind.lower()}.yaml"
    manifest = pytorch_job(job) if kind == "PyTorchJob" else mpi_job(job)
    text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120)
    return Start({name: HEADERS[kind] + text}, ("kubectl", "apply", "-f", name), needs=("kubectl",))


class _Dumper(yaml.SafeDumper):
    """Writes a script as its lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

HEADERS = {
    "PyTorchJob": """\
# torchrun in one pod per host: kubectl apply -f launch/pytorchjob.yaml
# Needs Kubeflow's training operator v1, an image with dualtok, and a claim that pods can write.
""",
    "MPIJob": """\
# mpirun in a launcher pod starts the ranks in one worker pod per host: kubectl apply -f launch/mpijob.yaml
# Needs Kubeflow's training operator v1, an image with dualtok, Open MPI and mpi4py, and a claim that pods can write.
""",
}


def pytorch_job(job: Job) -> Json:
    """Return a PyTorchJob: the operator tells each pod's torchrun the rendezvous through ``PET_*`` variables."""
    command = [
        job.python,
        "-m",
        "torch.distributed.run",
        "--log-dir",
        f"{job.logs}/$(POD_NAME)",
        "--redirects",
        "3",
        "--tee",
        "3",
        "-m",
        "dualtok",
        *_arguments(job),
    ]
    pod_name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    patience = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(job.settings.stop_seconds)}
    pod = _pod(job, "pytorch", command, [pod_name, patience])
    rendezvous = job.settings.torchrun
    waits = {"last_call_timeout": rendezvous.last_call_seconds, "read_timeout": rendezvous.read_seconds}
    return {
        **_header(job),
        "spec": {
            "nprocPerNode": str(job.gpus),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvPort": job.settings.port,
                "maxRestarts": job.settings.restarts,
                "rdzvConf": [{"key": name, "value": str(value)} for name, value in waits.items()],
                "minReplicas": job.settings.min_nodes or job.nodes,
                "maxReplicas": job.nodes,
            },
            "runPolicy": _policy(job),
            # A pod that failed or was evicted is started again and meets the others at a new rendezvous.
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
            },
        },
    }


def mpi_job(job: Job) -> Json:
    """Return an MPIJob: the operator gives the launcher pod a hostfile and a way into the worker pods."""
    options = [option for entry in _environment(job) for option in ("-x", entry["name"])]
    interface = job.settings.interface
    for layer in () if interface is None else ("btl", "oob"):  # Open MPI's own connections
        options += ["--mca", f"{layer}_tcp_if_include", str(interface)]
    command = [
        "bash",
        "-c",
        HAND_ON,
        "launcher",
        "mpirun",
        "--allow-run-as-root",
        "-n",
        str(job.nodes * job.gpus),
        "--map-by",
        f"ppr:{job.gpus}:node",
        "--bind-to",
        "none",
        *options,
        "--output-filename",
        job.logs,
        job.python,
        "-m",
        "dualtok",
        *_arguments(job),
    ]
    launcher = _pod(job, "launcher", command, [], accelerators=False)
    worker = _pod(job, "worker", ["sleep", "infinity"], [])
    return {
        **_header(job),
        "spec": {
            "slotsPerWorker": job.gpus,
            "runPolicy": _policy(job),
            "mpiReplicaSpecs": {
                "Launcher": {"replicas": 1, "restartPolicy": "OnFailure", "template": {"spec": launcher}},
                "Worker": {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": worker}},
            },
        },
    }


def _header(job: Job) -> Json:
    settings = job.settings.k8s
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": settings.kind,
        "metadata": {"name": job.name, "namespace": settings.namespace},
    }


def _policy(job: Job) -> Json:
    return {"cleanPodPolicy": "Running", "backoffLimit": job.settings.restarts}


def _arguments(job: Job) -> list[str]:
    return list(job.arguments) or ["train", "run.yaml", "--auto-resume"]


def _environment(job: Job) -> list[dict[str, Any]]:
    settings = job.settings
    cache = settings.cache_dir or CACHE
    values = {
        "TORCH_EXTENSIONS_DIR": f"{cache}/torch_extensions",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "HF_HOME": f"{cache}/huggingface",
        "OMP_NUM_THREADS": "1",
        "LOCAL_SIZE": str(job.gpus),
        "NCCL_DEBUG": "WARN",
    }
    if settings.interface is not None:
        values |= {"NCCL_SOCKET_IFNAME": settings.interface, "GLOO_SOCKET_IFNAME": settings.interface}
    return [{"name": name, "value": value} for name, value in (values | settings.environment).items()]


def _pod(job: Job, name: str, command: list[str], extra: list[Json], *, accelerators: bool = True) -> Json:
    settings = job.settings.k8s
    mounts = {"work": settings.folder, "cache": job.settings.cache_dir or CACHE, "shm": "/dev/shm"}
    container: Json = {
        "name": name,
        "image": settings.image,
        "workingDir": settings.folder,
        "command": command,
        "env": [*_environment(job), *extra],
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
    }
    if accelerators and settings.resource is not None:
        container["resources"] = {"limits": {settings.resource: str(job.gpus)}}
    return {
        "terminationGracePeriodSeconds": job.settings.stop_seconds,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "cache", "emptyDir": {}},  # on the host's disk, one per pod
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        ],
    }
