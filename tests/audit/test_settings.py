from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from dualtok.audit.attacks.registry import ATTACKS, names_of
from dualtok.audit.settings import AuditConfig


def test_defaults_run_every_attack_that_needs_no_more_than_one_pass() -> None:
    config = AuditConfig()
    assert config.attacks == (
        "loss",
        "ref",
        "zlib",
        "min_k",
        "min_k_plus_plus",
        "surp",
        "dc_pdd",
        "wbc",
        "error_zone",
        "ht_mia",
        "ref_distance",
        "above_share",
        "above_mean",
        "above_tail",
        "ref_classifier",
        "ref_forest",
        "rmia",
    )
    reruns = {"lowercase", "recall", "con_recall", "neighborhood", "gradient_norm"}
    costly = {"info_rmia", *reruns, "lira", "lira_offline", "shadow_classifier", "lt_mia"}
    assert set(ATTACKS) - set(config.attacks) == costly == set(names_of("joint", "rerun", "shadows"))
    assert (config.bootstrap_resamples, config.confidence, config.min_k_share) == (1000, 0.95, 0.2)
    assert config.fpr_targets == [0.1, 0.01, 0.001]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bootstrap_resamples": 99},
        {"confidence": 1.0},
        {"confidence": 0.5},
        {"fpr_targets": []},
        {"fpr_targets": [0.0]},
        {"fpr_targets": [1.0]},
        {"fpr_targets": [0.1, 0.1]},
        {"min_k_share": 0.0},
        {"min_k_share": 1.1},
        {"attacks": []},
        {"attacks": ["loss", "loss"]},
        {"attacks": ["los"]},
        {"extract": 0},
        {"extract_tokens": 0},
        {"extract_prefix": 20},
        {"extract": 5, "deepspeed": "z3.json"},
        {"batch_size": 0},
        {"max_documents": 1},
        {"seed": -1},
        {"resamples": 1000},
    ],
)
def test_settings_out_of_range_and_unknown_keys_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AuditConfig).validate_python(wrong)


def test_two_runs_do_not_share_their_targets() -> None:
    first = AuditConfig()
    first.fpr_targets.append(0.5)
    assert AuditConfig().fpr_targets == [0.1, 0.01, 0.001]
