"""Figures for a model card, read back by the library of the hub itself."""

from __future__ import annotations

import math

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from dualtok.audit.report.cards.hugging_face import markdown_table, model_index
from dualtok.audit.report.data import AuditFigures
from tests.audit.report.small import canaries, estimate, full_report, row

FIGURES = AuditFigures(settings=full_report().settings, models=full_report().rows)


def test_the_hub_reads_the_figures_back() -> None:
    whole = FIGURES.models[0]
    index = model_index("mine", whole, FIGURES)
    card = ModelCard(f"---\n{yaml.safe_dump({'model-index': index}, sort_keys=False)}---\n\n# mine\n")
    assert isinstance(card.data, ModelCardData)
    results = card.data.eval_results
    assert results is not None
    found = {(result.metric_name, result.metric_args["of"]): result for result in results}
    assert len(found) == len(results)
    strongest = results[0]
    assert strongest.metric_name == "membership inference AUC (strongest of 1)"
    assert (strongest.task_type, strongest.metric_type) == ("text-generation", "membership_inference_auc")
    assert strongest.dataset_name == "private documents, 1000 members and 1000 non-members"
    assert strongest.metric_value == whole.strongest.auc_two_sided.value
    assert strongest.metric_args["low"] == whole.strongest.auc_two_sided.low
    assert strongest.metric_args["high"] == whole.strongest.auc_two_sided.high
    assert strongest.metric_args["confidence"] == 0.95
    assert results[1].metric_name == "membership inference TPR at 1 % FPR (strongest of 1)"
    assert found["perplexity", "non-members"].metric_value == 11
    name, again = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, again) == [{"name": "mine", "results": [{**index[0]["results"][0]}]}], (
        "nothing that the hub has no place for"
    )


def test_what_is_no_number_is_left_out() -> None:
    diverged = FIGURES.models[1]
    assert diverged.perplexity_members == math.inf
    kinds = [metric["type"] for metric in model_index("mine", diverged, FIGURES)[0]["results"][0]["metrics"]]
    assert kinds == ["membership_inference_auc", "membership_inference_tpr_at_0.01_fpr", "perplexity"]


def test_a_lower_bound_has_no_upper_end() -> None:
    metrics = model_index("mine", FIGURES.models[0], FIGURES)[0]["results"][0]["metrics"]
    bounds = [metric["args"] for metric in metrics if metric["type"] == "epsilon_lower_bound"]
    assert [("low" in bound, "high" in bound) for bound in bounds] == [(True, False)] * 2


def test_the_table_has_one_line_per_model() -> None:
    secret = row("a|b", canaries=canaries(extracted=estimate(0, 0, 0.03)), strongest_tpr=[])
    lines = markdown_table([*FIGURES.models, secret]).splitlines()
    assert lines[2] == (
        "| whole | .550 [.500, .580] (Ref) | .030 [.020, .050] at 1 % FPR | "
        ".100 [.000, .200] of the members, .100 [.000, .200] of the canaries | 11.000 |"
    )
    assert lines[3].endswith("| n/a | 11.000 |")
    assert lines[4].startswith("| a\\|b | .550 [.500, .580] (Ref) | n/a | .000 [.000, .030] of the canaries |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
