"""An audit of any model on two lists of texts: by one command, by a run file, and by a function."""

from __future__ import annotations

import csv
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from dualtok.audit import audit_model
from dualtok.audit.report.write import load_report
from dualtok.audit.settings import AuditConfig
from dualtok.data.tokenizer import train_tokenizer
from dualtok.errors import ConfigError, DataError
from dualtok.objective.head import LossHead
from tests.commands.audit.conftest import write_list
from tests.support import ROOT, dualtok, error_line, save_model, succeed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.commands.audit.conftest import Overfitted

QUICK = ("audit.bootstrap_resamples=100", "audit.permutations=99")


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    models = json.loads((folder / "audit" / "audit.json").read_text())["models"]
    return {model["name"]: model for model in models}


def auc(row: dict[str, Any], attack: str) -> float:
    (found,) = [each["auc"]["value"] for each in row["attacks"] if each["name"] == attack]
    return float(found)


@pytest.mark.slow
def test_one_command_gives_the_truth_about_a_model_of_the_plain_trainer(overfitted: Overfitted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--members", overfitted.members_file, "--non-members", overfitted.non_members_file, "--out", out]
    models = ["--model", f"mine={overfitted.folder}", "--model", overfitted.base, "--base", overfitted.base]
    shown = succeed(dualtok("audit", *models, *flags, *QUICK, "audit.null_model=base"))
    found = rows(out)
    assert list(found) == ["mine", "base"]
    assert found["mine"]["n_members"] == found["mine"]["n_non_members"] == 40
    assert auc(found["mine"], "loss") > 0.97
    assert auc(found["mine"], "ref") > 0.97, "the base serves as the attacker's reference"
    assert abs(auc(found["base"], "loss") - 0.5) < 0.2, "it has seen neither list"
    assert str(out / "report" / "report.html") in shown
    identity = json.loads((out / "report" / "report.json").read_text())["identity"]
    assert identity["members"] == f"texts of {overfitted.members_file}"
    assert "data" not in identity
    # The same as a run file, and nothing is run again.
    signals = {file: file.stat().st_mtime_ns for file in (out / "audit" / "signals").iterdir()}
    assert len(signals) == 4, "the base's signals are the reference's"
    first = (out / "audit" / "audit.json").read_text()
    succeed(dualtok("audit", out / "audit.yaml"))
    assert {file: file.stat().st_mtime_ns for file in (out / "audit" / "signals").iterdir()} == signals
    assert (out / "audit" / "audit.json").read_text() == first


@pytest.mark.slow
def test_two_ranks_and_other_kinds_of_lists_give_the_same(overfitted: Overfitted, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(overfitted.members):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    table = tmp_path / "others.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "person"])
        writer.writeheader()
        writer.writerows({"text": text, "person": "x"} for text in overfitted.non_members)
    out, again = tmp_path / "one", tmp_path / "two"
    quick = [*QUICK, "audit.attacks=[loss,zlib]"]
    lists = ["--members", overfitted.members_file, "--non-members", overfitted.non_members_file]
    succeed(dualtok("audit", "--model", overfitted.folder, *lists, "--out", out, *quick))
    others = ["--members", folder, "--non-members", table]
    succeed(dualtok("audit", "--model", overfitted.folder, *others, "--out", again, *quick, ranks=2))
    (one,), (two,) = rows(out).values(), rows(again).values()
    for attack in ("loss", "zlib"):
        assert auc(one, attack) == pytest.approx(auc(two, attack), abs=1e-3)
    assert one["perplexity_members"] == pytest.approx(two["perplexity_members"], rel=1e-5)


def test_the_function_finds_in_memory_what_a_slow_pass_finds(overfitted: Overfitted, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(overfitted.folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.train()
    layer = model.get_output_embeddings()
    result = audit_model(
        model, tokenizer, overfitted.members, overfitted.non_members, overfitted.base, bootstrap_resamples=100
    )
    assert model.training, "a trainer goes on with it"
    assert model.get_output_embeddings() is layer
    assert not any(isinstance(module, LossHead) for module in model.modules())
    model.eval()
    losses = []
    for texts in (overfitted.members, overfitted.non_members):
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
            losses.append([float(model(input_ids=row, labels=row).loss) for row in ids])
    wins = [m < n for m in losses[0] for n in losses[1]]
    assert result.attacks.loc["Loss", "auc"] == pytest.approx(sum(wins) / len(wins), abs=1e-9)
    assert result.attacks.loc["Ref", "auc"] > 0.97
    assert set(AuditConfig().attacks) >= {attack.name for attack in result.model.attacks}
    assert len(result.table) > len(result.attacks)
    page = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert json.loads(result.to_json())["rows"][0]["name"] == "model"


def test_the_example_of_the_guide_runs(overfitted: Overfitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = (ROOT / "docs" / "audit-any-model.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len([line for line in example.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    given = {
        "model": AutoModelForCausalLM.from_pretrained(overfitted.folder),
        "tokenizer": AutoTokenizer.from_pretrained(overfitted.folder),
        "seen": overfitted.members,
        "unseen": overfitted.non_members,
        "base": str(overfitted.base),
    }
    exec(compile(example, "docs/audit-any-model.md", "exec"), given)
    assert given["result"].model.strongest.auc_two_sided.value > 0.97
    assert (tmp_path / "audit.html").is_file()
    assert load_report(tmp_path / "audit.json").rows == given["result"].figures.models


def test_groups_of_texts_are_audited_as_a_whole(overfitted: Overfitted) -> None:
    persons = [f"person {number // 4}" for number in range(40)]
    others = [f"other {number // 4}" for number in range(40)]
    result = audit_model(
        overfitted.folder,
        None,
        overfitted.members,
        overfitted.non_members,
        member_groups=persons,
        non_member_groups=others,
        bootstrap_resamples=100,
        attacks=("loss", "zlib"),
    )
    groups = result.model.groups
    assert groups is not None
    assert (groups.member_groups, groups.non_member_groups) == (10, 10)
    assert groups.strongest.value > 0.97
    assert groups.worst.documents == 4
    assert "person" not in groups.worst.name, "names are hidden unless they are asked for"


def test_texts_longer_than_the_context_are_cut(overfitted: Overfitted) -> None:
    quick: dict[str, Any] = {"attacks": ("loss",), "bootstrap_resamples": 100, "permutations": 99}
    long = [" ".join(overfitted.non_members[i : i + 4]) for i in range(0, 40, 4)]
    whole = audit_model(overfitted.folder, None, overfitted.members, long, **quick)
    short = audit_model(overfitted.folder, None, overfitted.members, long, block_length=64, **quick)
    assert whole.model.n_non_members == short.model.n_non_members == 10
    assert whole.model.perplexity_non_members != short.model.perplexity_non_members


@pytest.mark.slow
def test_models_of_two_tokenizers_stand_in_one_report(overfitted: Overfitted, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", 5, vocab_size=400)
    train_tokenizer(overfitted.members, 400).save_pretrained(other)
    lists = ["--members", overfitted.members_file, "--non-members", overfitted.non_members_file]
    models = ["--model", f"other={other}", "--model", f"mine={overfitted.folder}", "--base", overfitted.base]
    quick = [*QUICK, "audit.attacks=[loss,ref]"]
    succeed(dualtok("audit", *models, *lists, "--out", tmp_path / "out", *quick))
    found = rows(tmp_path / "out")
    assert list(found) == ["other", "mine"], "as they were given"
    assert auc(found["mine"], "ref") > 0.97
    assert [attack["name"] for attack in found["other"]["attacks"]] == ["loss"], "the base has another tokenizer"
    assert found["other"]["not_run"] == {"Ref": "needs reference"}
    figures = json.loads((tmp_path / "out" / "audit" / "audit.json").read_text())
    assert [reference["name"] for reference in figures["references"]] == ["attack_reference"]
    assert len(list((tmp_path / "out" / "audit" / "texts").iterdir())) == 2
    alone = [*lists, "--base", overfitted.base, "--out", tmp_path / "alone", *quick]
    assert "another tokenizer than every audited model" in error_line(dualtok("audit", "--model", other, *alone))


@pytest.mark.slow
def test_an_adapter_is_audited_as_the_model_that_it_makes(overfitted: Overfitted, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(overfitted.base)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    in_wrapping = audit_model(wrapped, *_lists(overfitted), attacks=("loss",), bootstrap_resamples=100)
    merged = wrapped.merge_and_unload()
    expected = audit_model(merged, *_lists(overfitted), attacks=("loss",), bootstrap_resamples=100)
    assert in_wrapping.model.perplexity_members == pytest.approx(expected.model.perplexity_members, rel=1e-5)
    bare = audit_model(overfitted.base, *_lists(overfitted), attacks=("loss",), bootstrap_resamples=100)
    assert abs(bare.model.perplexity_members - expected.model.perplexity_members) > 1, "the adapter does something"
    lists = ["--members", overfitted.members_file, "--non-members", overfitted.non_members_file]
    quick = [*QUICK, "audit.attacks=[loss,ref]"]
    for number, model in enumerate(
        (["--model", tmp_path / "adapter"], ["--model", overfitted.base, "--adapter", tmp_path / "adapter"])
    ):
        out = tmp_path / str(number)
        succeed(dualtok("audit", *model, *lists, "--base", overfitted.base, "--out", out, *quick))
        (row,) = rows(out).values()
        assert auc(row, "loss") == pytest.approx(expected.attacks.loc["Loss", "auc"], abs=2e-3)
        assert row["perplexity_members"] == pytest.approx(expected.model.perplexity_members, rel=1e-5)
        assert auc(row, "ref") is not None


def _lists(overfitted: Overfitted) -> tuple[Any, list[str], list[str]]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(overfitted.folder), overfitted.members, overfitted.non_members


@pytest.mark.slow
def test_several_references_count_together_and_one_is_trained_on_the_way(
    overfitted: Overfitted, tmp_path: Path
) -> None:
    others = write_list(tmp_path / "others.jsonl", overfitted.non_members[8:])
    out = tmp_path / "out"
    flags = ["--model", f"mine={overfitted.folder}", "--members", overfitted.members_file, "--non-members", others]
    references = ["--attack-reference", f"weak={overfitted.base}"]
    learned = write_list(tmp_path / "read.jsonl", overfitted.non_members[:8])
    references += ["--attack-reference", f"strong=train:{learned}", "--base", overfitted.base]
    quick = [*QUICK, "audit.attacks=[loss,ref,wbc,rmia,ref_distance]"]
    recipe = ["audit.reference_recipe.epochs=20", "audit.reference_recipe.learning_rate=5e-3"]
    shown = succeed(dualtok("audit", *flags, *references, "--out", out, *quick, *recipe))
    (row,) = rows(out).values()
    names = [attack["name"] for attack in row["attacks"]]
    alone = ["loss", "ref", "wbc", "rmia", "ref_distance"]
    assert names == [*alone, *(f"{name}@strong" for name in alone[1:])]
    assert "Attacks with the reference strong" in shown
    figures = json.loads((out / "audit" / "audit.json").read_text())
    weak, strong = figures["references"]
    assert (weak["name"], strong["name"]) == ("weak", "strong")
    assert strong["perplexity_non_members"] < weak["perplexity_non_members"], "it was trained"
    # The interval of the strongest holds for all nine: it is wider than that of the five with the first alone.
    succeed(dualtok("audit", *flags, *references[:2], "--out", tmp_path / "one", *quick))
    (few,) = rows(tmp_path / "one").values()
    assert {a["name"]: a["auc"] for a in few["attacks"]} == {
        a["name"]: a["auc"] for a in row["attacks"] if "@" not in a["name"]
    }
    # Trained once: the same call again trains nothing.
    trained = sorted((out / "audit" / "references").glob("*/model/model.safetensors"))
    times = [file.stat().st_mtime_ns for file in trained]
    assert len(times) == 1
    succeed(dualtok("audit", out / "audit.yaml"))
    assert [file.stat().st_mtime_ns for file in trained] == times


def test_lists_that_overlap_or_differ_by_themselves_are_void(overfitted: Overfitted) -> None:
    quick: dict[str, Any] = {"attacks": ("loss",), "bootstrap_resamples": 100, "permutations": 99}
    members = overfitted.members
    copied = audit_model(overfitted.folder, None, members, [*overfitted.non_members, members[0] + " Indeed."], **quick)
    assert copied.figures.checks is not None
    assert copied.figures.checks.void
    assert any("nearly the same as a member" in warning for warning in copied.warnings)
    shouted = audit_model(overfitted.folder, None, members, [text.upper() for text in overfitted.non_members], **quick)
    assert shouted.figures.checks is not None
    assert shouted.figures.checks.void
    assert any("differ by themselves" in warning for warning in shouted.warnings)
    sound = audit_model(overfitted.folder, None, members, overfitted.non_members, **quick)
    assert sound.warnings == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--members", "a.txt"], "--non-members: missing"),
        (["--members", "a.txt"], "give a run's YAML file, or --model"),
        (["run.yaml", "--field", "body"], "--field: only together with --model"),
        (["--model", "x/m", "--model", "y/m", "--members", "a", "--non-members", "b"], "two are called 'm'"),
        (["run.yaml", "--model", "m", "--members", "a", "--non-members", "b"], "run.yaml: not a setting"),
        (["--model", "{model}", "--members", "./none.jsonl", "--non-members", "{b}"], "audit.members: none.jsonl: no"),
        (["--model", "{model}", "--members", "{b}", "--non-members", "{b}"], "is also audit.non_members"),
        (["--model", "{model}", "--members", "{a}", "--non-members", "{b}", "--field", "body"], "audit.members: "),
        (["--model", "{model}", "--members", "{a}", "--non-members", "{blank}"], "all 2 texts are blank"),
        (["--model", "{model}", "--members", "{a}", "--non-members", "{b}", "--base", "{bare}"], "tokenizer"),
    ],
)
def test_bad_calls_say_what_is_wrong(
    overfitted: Overfitted, tmp_path: Path, arguments: list[str], message: str
) -> None:
    known = {
        "model": overfitted.folder,
        "a": overfitted.members_file,
        "b": overfitted.non_members_file,
        "blank": write_list(tmp_path / "blank.jsonl", [" ", "\n"]),
        "bare": tmp_path / "bare",
    }
    if "{bare}" in arguments:
        save_model(tmp_path / "bare", 1)
    out = ["--out", tmp_path / "out"] if "run.yaml" not in arguments[0] else []
    assert message in error_line(dualtok("audit", *(text.format(**known) for text in arguments), *out))
    assert not (tmp_path / "out" / "report").exists()


def test_a_split_is_not_compared_with_texts() -> None:
    with pytest.raises(ValueError, match="two splits, or two sources"):
        AuditConfig(members="train", non_members={"source": "b.txt"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_length: only where"):
        AuditConfig(block_length=64)
    with pytest.raises(ValueError, match="adapters: 'x' is none"):
        AuditConfig(adapters={"x": "folder"})
    with pytest.raises(ValueError, match="shadows: shadow models are trained on prepared"):
        AuditConfig(members={"source": "a.txt"}, non_members={"source": "b.txt"}, shadows=2)  # type: ignore[arg-type]


def test_the_function_refuses_what_it_cannot_do(overfitted: Overfitted) -> None:
    with pytest.raises(ConfigError, match="'recall' needs `dualtok audit`"):
        audit_model(overfitted.folder, None, ["a b"], ["b c"], attacks=("recall",))
    with pytest.raises(ConfigError, match="give the model's tokenizer"):
        audit_model(torch.nn.Linear(1, 1), None, ["a b"], ["b c"])
    with pytest.raises(DataError, match="no members: all 1 texts are blank"):
        audit_model(overfitted.folder, None, [" "], ["b c"])


def test_a_run_file_of_texts_needs_no_data(tmp_path: Path, overfitted: Overfitted) -> None:
    sources = {"members": overfitted.members_file, "non_members": overfitted.non_members_file}
    audit = {"models": {"m": str(overfitted.folder)}, **{key: {"source": str(file)} for key, file in sources.items()}}
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "audit": audit}))
    succeed(dualtok("audit", run, "audit.attacks=[loss]", *QUICK))
    assert auc(rows(tmp_path / "run")["m"], "loss") > 0.97
