from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from dualtok.commands.status import read_status
from dualtok.config.load import load_run, parse_run
from dualtok.config.old_names import with_new_names
from dualtok.data.folder import DataFolder
from dualtok.data.prepare.pipeline import prepare
from dualtok.errors import ConfigError
from dualtok.reference.fingerprint import blocks_digest
from dualtok.train.history import read_history
from tests.support import dualtok, error_line

if TYPE_CHECKING:
    from pathlib import Path

OLD: dict[str, Any] = {
    "data": {"dir": "data", "source": "a.jsonl", "shares": {"train": 0.5, "reference": 0.2, "probe": 0.1}},
    "model": {"path": "m", "quantise": "nf4", "lora": {"rank": 4}},
    "train": {"learning_rate": 0.1, "batch_size": 8, "steps": 3, "split": "probe"},
    "objective": "dual",
    "selection": {"memorised_share": 0.1},
    "reference": {"model": "r", "splits": ["probe", "validation"]},
    "retreat": {"reference": "r", "stand_in": "s", "members": "probe"},
    "audit": {
        "attacks": ["loss", "neighbourhood"],
        "passes": {"neighbours": 3, "neighbour_share": 0.1},
        "members": "probe",
    },
}


def test_a_run_file_of_version_0_1_is_read_under_the_present_names(capsys: pytest.CaptureFixture[str]) -> None:
    run = parse_run(OLD, source="old.yaml")
    assert run.data.shares["auxiliary"] == 0.1
    assert run.model is not None
    assert run.train is not None
    assert run.selection is not None
    assert run.reference is not None
    assert run.interpolate is not None
    assert (run.model.quantize, run.train.split, run.selection.memorized_share) == ("nf4", "auxiliary", 0.1)
    assert run.reference.splits == ("auxiliary", "validation")
    assert (run.interpolate.surrogate_reference, run.interpolate.members) == ("s", "auxiliary")
    assert run.audit.attacks == ("loss", "neighborhood")
    assert (run.audit.reruns.neighbors, run.audit.reruns.neighbor_share, run.audit.members) == (3, 0.1, "auxiliary")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 13
    assert "dualtok: old.yaml: retreat is now called interpolate; the old name works until 0.3" in told
    assert parse_run(run.as_dict()).as_dict() == run.as_dict()
    assert capsys.readouterr().err == "", "the present names are no news"


def test_old_names_work_on_the_command_line_and_in_stored_runs(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {dir: data}\n")
    run = load_run(path, ["retreat={reference: r, stand_in: s}", "retreat.auc=0.6"])
    assert run.interpolate is not None
    assert (run.interpolate.surrogate_reference, run.interpolate.auc) == ("s", 0.6)
    stored, notes = with_new_names(OLD)
    assert "retreat" in OLD, "what was given is left as it was"
    assert (list(stored)[6], len(notes)) == ("interpolate", 13), "the order of the sections is kept"


def test_a_setting_under_both_names_is_refused() -> None:
    both = {"data": {"dir": "d"}, "retreat": {"reference": "a", "stand_in": "b"}, "interpolate": {"reference": "c"}}
    with pytest.raises(ConfigError, match="interpolate: given twice, as retreat too"):
        parse_run(both)


def test_the_old_verb_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {dir: data}\n")
    ended = dualtok("retreat", path, tmp_path / "model")
    assert "`dualtok retreat` is now called `dualtok interpolate`" in ended.stderr
    assert "`dualtok interpolate` needs the section 'interpolate'" in error_line(ended)


def test_a_prepared_folder_of_version_0_1_holds_its_probe_split_as_auxiliary(
    small_corpus: dict[str, Any], tmp_path: Path
) -> None:
    old = tmp_path / "prepared"
    shutil.copytree(small_corpus["dir"], old)
    (old / "auxiliary").rename(old / "probe")
    for name in ("manifest.json", "prepare.json"):
        content = (old / name).read_text()
        assert '"auxiliary"' in content
        (old / name).write_text(content.replace('"auxiliary"', '"probe"'))
    now, before = DataFolder(small_corpus["dir"]), DataFolder(old)
    assert list(before.manifest.splits) == list(now.manifest.splits)
    batches = [data.open("auxiliary", seed=3).read(range(8))["input_ids"] for data in (now, before)]
    np.testing.assert_array_equal(*batches)
    assert before.documents("auxiliary").equals(now.documents("auxiliary"))
    assert blocks_digest(before.manifest) != blocks_digest(now.manifest), "scores of then are named by the old folder"
    config = parse_run({"data": {**small_corpus, "dir": str(old)}}).data
    manifest = prepare(config, progress=False)
    assert manifest.folder_of("auxiliary") == "probe", "it is prepared already"
    assert json.loads((old / "manifest.json").read_text())["splits"].keys() >= {"probe"}


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        ("interpolate: {reference: r, surrogate_reference: s}", "retreat.auc=0.6", ("interpolate", "auc", 0.6)),
        ("retreat: {reference: r, stand_in: s}", "interpolate.auc=0.6", ("interpolate", "auc", 0.6)),
        ("retreat: {reference: r, stand_in: s}", "retreat.stand_in=t", ("interpolate", "surrogate_reference", "t")),
        (
            "audit: {attacks: [neighbourhood], passes: {neighbours: 3}}",
            "audit.reruns.neighbor_share=0.2",
            ("audit", "reruns", None),
        ),
        (
            "audit: {attacks: [neighborhood], reruns: {neighbors: 3}}",
            "audit.passes.neighbour_share=0.2",
            ("audit", "reruns", None),
        ),
    ],
)
def test_a_file_and_an_override_may_use_different_names(
    tmp_path: Path, file: str, override: str, expected: tuple[str, str, Any]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{dir: data}}\n{file}\n")
    section, key, value = expected
    found = getattr(getattr(load_run(path, [override]), section), key)
    if key == "reruns":
        assert (found.neighbors, found.neighbor_share) == (3, 0.2)
    else:
        assert found == value


def test_an_error_about_two_names_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {dir: d}\nmodel: {path: m, quantise: nf4, quantize: nf4}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: model\.quantize: given twice"):
        load_run(path)


def test_one_rank_alone_tells_of_old_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    parse_run(OLD, source="old.yaml")
    assert capsys.readouterr().err == ""


def test_histories_are_read_under_the_present_names(tmp_path: Path) -> None:
    lines = [{"step": 1, "memorised_loss": 2.0}, {"step": 2, "ranks": [{"rank": 0, "optimiser": 0.5}]}]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "old.jsonl") == [
        {"step": 1, "memorized_loss": 2.0},
        {"step": 2, "ranks": [{"rank": 0, "optimizer": 0.5}]},
    ]


def test_the_status_of_a_run_says_nothing_of_names_in_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**OLD, "output_dir": str(tmp_path)}))
    assert read_status(tmp_path).total_steps == 3
    assert capsys.readouterr().err == ""
