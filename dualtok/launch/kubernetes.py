"""Kubeflow's training operator: a PyTorchJob, or an MPIJob (both ``kubeflow.org/v1``)."""

from __future__ import annotations

from typing import Any

import yaml

from dualtok.launch.job import Job, Start

CACHE = "/cache"
Json = dict[str, Any]


def k8s(job: Job) -> Start:
    """Return the manifest and the command that gives it to the cluster."""
    kind = job.settings.k8s.kind
    name = f"{kind.lower()}.yaml"
    manifest = pytorch_job(job) if kind == "PyTorchJob" else mpi_job(job)
    text = yaml.safe_dump(manifest, sort_keys=False, width=120)
    return Start({name: HEADERS[kind] + text}, ("kubectl", "apply", "-f", name), needs=("kubectl",))


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
        job.python, "-m", "torch.distributed.run", "--log-dir", f"{job.logs}/$(POD_NAME)", "--redirects", "3",
        "--tee", "3", "-m", "dualtok", *_arguments(job),
    ]  # fmt: skip
    pod_name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    patience = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(job.settings.stop_seconds)}
    # A store for each start: in the one that torch 2.13 keeps, ranks would find the addresses of dead ones.
    store = {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}
    pod = _pod(job, "pytorch", command, [pod_name, patience, store])
    return {
        **_header(job),
        "spec": {
            "nprocPerNode": str(job.gpus),
            "elasticPolicy": {
                "rdzvBackend": "c10d", "rdzvPort": job.settings.port, "maxRestarts": job.settings.restarts,
                "minReplicas": job.nodes, "maxReplicas": job.nodes,
            },
            "runPolicy": _policy(job),
            # A pod that failed or was evicted is started again and meets the others at a new rendezvous.
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
            },
        },
    }  # fmt: skip


def mpi_job(job: Job) -> Json:
    """Return an MPIJob: the operator gives the launcher pod a hostfile and a way into the worker pods."""
    variables = [option for entry in _environment(job) for option in ("-x", entry["name"])]
    command = [
        "mpirun", "--allow-run-as-root", "-n", str(job.nodes * job.gpus), "--map-by", f"ppr:{job.gpus}:node",
        "--bind-to", "none", *variables, "--output-filename", job.logs, job.python, "-m", "dualtok", *_arguments(job),
    ]  # fmt: skip
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
        "TORCH_EXTENSIONS_DIR": f"{cache}/torch_extensions", "TRITON_CACHE_DIR": f"{cache}/triton",
        "HF_HOME": f"{cache}/huggingface", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(job.gpus), "NCCL_DEBUG": "WARN",
    }  # fmt: skip
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
