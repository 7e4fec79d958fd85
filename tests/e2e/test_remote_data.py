"""Jobs on data at an address: the same results as from a local folder, through every fault that passes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dualtok.config.data import DataConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare.pipeline import prepare
from tests.data.remote.servers import CREDENTIALS, FaultServer, fault_server, s3_server, upload
from tests.support import dualtok, error_line, history, measured, save_model, succeed, tiny_llama_config, write_run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEED, STEPS, BATCH = 5, 12, 8
ENVIRONMENT = {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultServer]:
    with fault_server(s3) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference") / "model", seed=7)


@pytest.fixture(scope="module")
def scored(small_corpus: dict[str, Any], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a local folder of several shards per lane, with reference losses."""
    folder = tmp_path_factory.mktemp("scored")
    section = {**small_corpus, "dir": str(folder / "data"), "rows_per_shard": 8}
    prepare(DataConfig(**section), progress=False)
    run = write_run(folder / "score.yaml", {"dir": str(folder / "data")}, reference={"model": str(model)})
    succeed(dualtok("score", run))
    return folder / "data"


@pytest.fixture(scope="module")
def address(scored: Path, s3: str) -> str:
    return upload(scored, s3, "scored")


def run_file(path: Path, data: dict[str, Any], model: Path, **changes: Any) -> Path:
    train = {
        "learning_rate": 5e-3,
        "batch_size": BATCH,
        "gradient_accumulation": 2,
        "steps": STEPS,
        "precision": "fp32",
        "evaluate_every": 6,
        **changes,
    }
    return write_run(
        path,
        data,
        seed=SEED,
        objective="dual",
        model={"config": tiny_llama_config()},
        reference={"model": str(model)},
        monitor={"log_every": 1},
        train=train,
    )


def at_address(address: str, proxy: FaultServer, cache: Path, **stream: Any) -> dict[str, Any]:
    return {"dir": address, "stream": {"endpoint_url": proxy.url, "cache_dir": str(cache), **stream}}


def test_training_from_s3_is_training_from_the_folder(
    scored: Path, address: str, proxy: FaultServer, model: Path, tmp_path: Path
) -> None:
    local = run_file(tmp_path / "local.yaml", {"dir": str(scored)}, model)
    succeed(dualtok("train", local, ranks=2))
    plain = run_file(tmp_path / "plain.yaml", at_address(address, proxy, tmp_path / "cache"), model)
    succeed(dualtok("train", plain, ranks=2, **ENVIRONMENT))
    assert max(proxy.counts().values()) == 1, "two ranks of a host fetched the same shard"

    for part, fault in (("00-", "500"), ("01-", "truncated"), ("02-", "flipped"), ("03-", "gone"), ("04-", "slow")):
        proxy.spoil(f"shard-000{part}", fault, times=2)
    proxy.spoil("manifest.json", "500", times=1)
    faulty = run_file(
        tmp_path / "faulty.yaml", at_address(address, proxy, tmp_path / "other", cache_gib=1e-5), model, data_workers=2
    )
    output = dualtok("train", faulty, ranks=2, **ENVIRONMENT)
    succeed(output)
    assert "attempt 1 of 8 failed" in output.stderr

    assert len(history(local)) == STEPS
    for run in (plain, faulty):
        assert measured(run) == measured(local)
        evaluations = [file.with_suffix("") / "evaluations.jsonl" for file in (run, local)]
        assert evaluations[0].read_text() == evaluations[1].read_text()


def test_a_shard_that_goes_in_mid_epoch_stops_the_job_or_is_skipped_and_counted(
    scored: Path, address: str, proxy: FaultServer, model: Path, tmp_path: Path
) -> None:
    stream = DataFolder(scored).open("train", seed=SEED)
    early = {stream.locate(sample)[1] for sample in range(3 * BATCH)}
    lost = next(file for file in (stream.locate(sample)[1] for sample in range(STEPS * BATCH)) if file not in early)
    samples = [sample for sample in range(STEPS * BATCH) if stream.locate(sample)[1] == lost]
    proxy.spoil(f"train/{lost}", "gone")
    data = at_address(address, proxy, tmp_path / "cache", attempts=2, prefetch=0)

    def run(name: str, **changes: Any) -> Path:
        # Evaluations of members would read the lost shard, too.
        return run_file(tmp_path / name, {**data, **changes}, model, evaluate_every=STEPS, evaluation_blocks=1)

    stopped = run("stop.yaml")
    outcome = dualtok("train", stopped, ranks=2, **ENVIRONMENT)
    assert outcome.returncode != 0
    line = next(line for line in outcome.stderr.splitlines() if "dualtok: error:" in line)
    assert f"{address}/train/{lost}: given up after 2 attempts" in line
    assert "there is no such object" in line
    assert "Traceback" not in outcome.stderr.split("dualtok: error:")[0].split("torch")[0]
    assert len(history(stopped)) == samples[0] // BATCH

    skipping = run("skip.yaml", on_bad_shard="skip")
    outcome = dualtok("train", skipping, ranks=2, **ENVIRONMENT)
    succeed(outcome)
    assert f"blocks of train/{lost} are skipped" in outcome.stderr
    steps = history(skipping)
    assert [step["skipped_blocks"] for step in steps] == [
        sum(sample // BATCH == number for sample in samples) for number in range(STEPS)
    ]
    assert measured(skipping)[: len(history(stopped))] == measured(stopped)


def test_a_step_without_any_sound_block_changes_nothing(scored: Path, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(scored, copy)
    for shard in load_manifest(copy).splits["train"].shards:
        (copy / "train" / shard.file).unlink()
    run = run_file(tmp_path / "run.yaml", {"dir": str(copy), "on_bad_shard": "skip"}, model, steps=3)
    # The evaluation at the end has no member left.
    outcome = dualtok("train", run, ranks=2)
    assert "no token to predict" in outcome.stderr
    steps = history(run)
    assert [step["skipped_blocks"] for step in steps] == [BATCH] * 3
    assert all(step["loss"] == step["gradient_norm"] == step["tokens"] == 0 for step in steps)
    assert all(step["left_out"] is None for step in steps)


def test_the_stages_of_a_pipeline_count_a_skipped_block_once(scored: Path, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(scored, copy)
    stream = DataFolder(scored).open("train", seed=SEED)
    lost = stream.locate(BATCH)[1]
    (copy / "train" / lost).unlink()
    run = run_file(
        tmp_path / "run.yaml",
        {"dir": str(copy), "on_bad_shard": "skip"},
        model,
        steps=4,
        engine="pipeline",
        pipeline={"stages": 2},
    )
    succeed(dualtok("train", run, ranks=2))
    files = [[stream.locate(sample)[1] for sample in range(BATCH * step, BATCH * (step + 1))] for step in range(4)]
    assert [step["skipped_blocks"] for step in history(run)] == [names.count(lost) for names in files]
    assert sum(names.count(lost) for names in files) > 0


def test_scores_are_written_to_s3_and_gone_on_with(
    scored: Path, proxy: FaultServer, model: Path, tmp_path: Path
) -> None:
    s3 = str(proxy.upstream)
    bare = tmp_path / "bare"
    shutil.copytree(scored, bare, ignore=shutil.ignore_patterns("scores"))
    address = upload(bare, s3, "bare")
    run = write_run(
        tmp_path / "run.yaml", at_address(address, proxy, tmp_path / "cache"), reference={"model": str(model)}
    )
    import s3fs

    store = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=s3, skip_instance_cache=True)
    succeed(dualtok("score", run, ranks=2, **ENVIRONMENT))
    files = sorted(path for path in store.find("bucket/bare/scores") if path.endswith(".arrow"))
    own = sorted(scored.glob("scores/*/*/*.arrow"))
    assert [Path(path).name for path in files] == [path.name for path in own]
    assert all(store.cat_file(path) == file.read_bytes() for path, file in zip(files, own, strict=True))

    index = next(path for path in store.find("bucket/bare/scores") if path.endswith("scores.json"))
    content = store.cat_file(index)
    store.rm_file(index)  # as if the job had been killed before the end,
    store.rm_file(files[0])
    store.rm_file(files[0].replace(".arrow", ".json"))  # with one shard not begun
    assert f"{len(files)} shards scored (1 now" in succeed(dualtok("score", run, **ENVIRONMENT))
    store.invalidate_cache()
    assert store.cat_file(index) == content
    assert f"{len(files)} shards scored (0 now" in succeed(dualtok("score", run, **ENVIRONMENT))
    with fault_server(bare) as web:
        web_run = write_run(tmp_path / "web.yaml", {"dir": web.url}, reference={"model": str(model)})
        assert "nothing can be written there" in error_line(dualtok("score", web_run, XDG_CACHE_HOME=str(tmp_path)))


def test_an_audit_from_s3_is_an_audit_of_the_folder(
    scored: Path, address: str, proxy: FaultServer, model: Path, tmp_path: Path
) -> None:
    audit = {"models": {"model": str(model)}, "bootstrap_resamples": 100}
    figures = []
    for name, data in (("local", {"dir": str(scored)}), ("s3", at_address(address, proxy, tmp_path / "cache"))):
        run = write_run(tmp_path / f"{name}.yaml", data, audit=audit)
        succeed(dualtok("audit", run, **ENVIRONMENT))
        figures.append((run.with_suffix("") / "audit" / "audit.json").read_text())
    assert figures[0] == figures[1]
