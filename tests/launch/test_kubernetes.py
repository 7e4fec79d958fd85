"""Manifests against the models of Kubeflow's training SDK and of the Kubernetes client: every key must be theirs."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import kubernetes.client.models
import pytest
import yaml
from kubeflow.training import models

from dualtok.config.launch import KubernetesConfig, LaunchConfig
from dualtok.launch.job import Job
from dualtok.launch.kubernetes import k8s
from tests.support import ROOT

KINDS = {"PyTorchJob": models.KubeflowOrgV1PyTorchJob, "MPIJob": models.KubeflowOrgV1MPIJob}
SCALARS = {"str": str, "int": int, "bool": bool, "float": float, "datetime": str}


def deserialise(kind: str, value: Any, path: str = "") -> Any:
    """Build a model of a type as the SDKs write them (``list[V1Volume]``, ``dict(str, str)``, ``V1Pod``, ``int``).

    The SDKs' own reader drops what it does not know; here an unknown key or another type is an error.
    """
    if outer := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), f"{path}: not a list"
        return [deserialise(outer[1], item, f"{path}[{place}]") for place, item in enumerate(value)]
    if outer := re.fullmatch(r"dict\(str, (.*)\)", kind):
        assert isinstance(value, dict), f"{path}: not a mapping"
        return {name: deserialise(outer[1], item, f"{path}.{name}") for name, item in value.items()}
    if kind in SCALARS:
        assert type(value) is SCALARS[kind], f"{path}: {value!r} is no {kind}"
        return value
    model = getattr(models, kind, None) or getattr(kubernetes.client.models, kind)
    assert isinstance(value, dict), f"{path}: not a mapping"
    attributes = {key: name for name, key in model.attribute_map.items()}
    unknown = set(value) - set(attributes)
    assert not unknown, f"{path}: unknown {unknown}"
    fields = {
        attributes[key]: deserialise(model.openapi_types[attributes[key]], item, f"{path}.{key}")
        for key, item in value.items()
    }
    return model(**fields)  # refuses what lacks a required field


def job(kind: str, **changes: Any) -> Job:
    return Job(
        2,
        4,
        LaunchConfig(k8s=KubernetesConfig(kind, image="registry/dualtok:1"), **changes),
        arguments=("train", "run.yaml", "train.steps=3", "--auto-resume"),
        name="dualtok-run",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_manifest_is_one_that_the_operator_knows(kind: str) -> None:
    text = k8s(job(kind, interface="eth0", environment={"HF_HUB_OFFLINE": "1"})).files[f"{kind.lower()}.yaml"]
    read = deserialise(KINDS[kind].__name__, yaml.safe_load(text))
    assert (read.api_version, read.kind, read.metadata.name) == ("kubeflow.org/v1", kind, "dualtok-run")
    replicas = read.spec.pytorch_replica_specs if kind == "PyTorchJob" else read.spec.mpi_replica_specs
    worker = replicas["Worker"]
    [container] = worker.template.spec.containers
    assert worker.replicas == 2
    assert container.resources.limits == {"nvidia.com/gpu": "4"}
    assert container.image == "registry/dualtok:1"
    assert {entry.name: entry.value for entry in container.env if entry.value}.items() >= {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "HF_HUB_OFFLINE": "1",
        "LOCAL_SIZE": "4",
    }.items()
    mounted = {mount.name for mount in container.volume_mounts}
    assert mounted == {volume.name for volume in worker.template.spec.volumes}
    starter = replicas["Launcher"].template.spec.containers[0] if kind == "MPIJob" else container
    assert starter.command[-5:] == ["dualtok", "train", "run.yaml", "train.steps=3", "--auto-resume"]
    if kind == "PyTorchJob":
        policy = read.spec.elastic_policy
        assert (read.spec.nproc_per_node, policy.min_replicas, policy.max_replicas) == ("4", 2, 2)
        assert {entry.key: entry.value for entry in policy.rdzv_conf} == {
            "last_call_timeout": "30",
            "read_timeout": "60",
        }
    else:
        assert read.spec.slots_per_worker == 4
        assert starter.command[starter.command.index("-n") + 1] == "8"
        shown = " ".join(starter.command)
        assert "--mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 " in shown
        assert starter.resources is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipes_are_valid_and_a_wrong_key_is_found(kind: str) -> None:
    tree = yaml.safe_load((ROOT / "launch" / f"{kind.lower()}.yaml").read_text())
    deserialise(KINDS[kind].__name__, tree)
    specs = "pytorchReplicaSpecs" if kind == "PyTorchJob" else "mpiReplicaSpecs"
    for change in ({"mountpath": "/x"}, {"mountPath": 1}):
        broken = copy.deepcopy(tree)
        broken["spec"][specs]["Worker"]["template"]["spec"]["containers"][0]["volumeMounts"][0].update(change)
        with pytest.raises(AssertionError, match=r"volumeMounts\[0\]"):
            deserialise(KINDS[kind].__name__, broken)


def test_a_job_that_may_go_on_with_fewer_hosts_says_so() -> None:
    tree = yaml.safe_load(k8s(job("PyTorchJob", min_nodes=1)).files["pytorchjob.yaml"])
    assert (tree["spec"]["elasticPolicy"]["minReplicas"], tree["spec"]["elasticPolicy"]["maxReplicas"]) == (1, 2)


def test_a_cluster_without_accelerators_is_asked_for_none() -> None:
    plain = job("PyTorchJob")
    settings = replace(plain.settings, k8s=KubernetesConfig(resource=None))
    assert "limits" not in k8s(replace(plain, settings=settings)).files["pytorchjob.yaml"]
