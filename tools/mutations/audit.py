"""Faults in the audit: attacks, figures, and the tests that say how sure they are."""

from __future__ import annotations

from mutations.fault import Fault

TESTS = "tests/audit"
ATTACKS, CHECKS, COLLECTION = "dualtok/audit/attacks.py", "dualtok/audit/checks.py", "dualtok/audit/collection.py"
EPSILON, EVALUATE, EXPOSURE = "dualtok/audit/epsilon.py", "dualtok/audit/evaluate.py", "dualtok/audit/exposure.py"
LIRA, METRICS, RAGGED = "dualtok/audit/lira.py", "dualtok/audit/metrics.py", "dualtok/audit/ragged.py"
CROSSFIT = "dualtok/audit/crossfit.py"
OF_ATTACKS, OF_CHECKS = (f"{TESTS}/test_attacks.py",), f"{TESTS}/test_checks.py"
OF_COLLECTION, OF_EPSILON = f"{TESTS}/test_collection.py", (f"{TESTS}/test_epsilon.py",)
OF_EVALUATE, OF_EXPOSURE = (f"{TESTS}/test_evaluate.py",), (f"{TESTS}/test_exposure.py",)
OF_LIRA, OF_METRICS, OF_RAGGED = (f"{TESTS}/test_lira.py",), (f"{TESTS}/test_metrics.py",), (f"{TESTS}/test_ragged.py",)

AUDIT: tuple[Fault, ...] = (
    Fault(
        "auc-sides", METRICS, "(ranks[:n].sum() - n * (n + 1) / 2)", "(ranks[n:].sum() - m * (m + 1) / 2)",
        "the AUC is that of the non-members", OF_METRICS,
    ),
    Fault(
        "auc-ties", METRICS, "scipy.stats.rankdata(np.concatenate([member_scores, non_member_scores]))",
        'scipy.stats.rankdata(np.concatenate([member_scores, non_member_scores]), method="max")',
        "a tie does not count one half", OF_METRICS,
    ),
    Fault(
        "counted-ties", METRICS, "below + 0.5 * non_members_ru", "below + non_members_ru",
        "a tie counts as won in the bootstrap", OF_METRICS,
    ),
    Fault(
        "tpr-beyond", METRICS, 'np.searchsorted(false_positives, allowed, side="right") - 1',
        'np.searchsorted(false_positives, allowed, side="right")', "the TPR is taken beyond the allowed FPR",
        OF_METRICS,
    ),
    Fault(
        "counted-tpr", METRICS, "np.where(false_positives <= allowed,", "np.where(false_positives < allowed,",
        "a target that is met exactly does not count", OF_METRICS,
    ),
    Fault(
        "one-sided-interval", METRICS, "tail = (1 - confidence) / 2", "tail = 1 - confidence",
        "an interval of 95 % holds 90 %", OF_METRICS,
    ),
    Fault(
        "two-sided", METRICS, "return max(auc, 1.0 - auc)", "return auc", "a reversed score is taken for harmless",
        OF_METRICS,
    ),
    Fault(
        "interval-straddles", METRICS, "(0.5 if straddles else min(two_sided(low), two_sided(high)))",
        "min(two_sided(low), two_sided(high))", "an interval around one half does not begin there", OF_METRICS,
    ),
    Fault(
        "classes-drawn-alike", METRICS, "for child in np.random.SeedSequence(seed).spawn(2)",
        "for child in (seed, seed)", "members and non-members are resampled by the same numbers", OF_METRICS,
    ),
    Fault(
        "curve-reversed", METRICS, "is_member = np.arange(len(codes)) < len(member_scores)",
        "is_member = np.arange(len(codes)) >= len(member_scores)", "the ROC curve is that of the non-members",
        OF_METRICS,
    ),
    Fault(
        "holm-factors", COLLECTION, "len(p_values) - np.arange(len(p_values))", "np.ones(len(p_values))",
        "p-values are not corrected for their number", (f"{OF_COLLECTION}::test_holm",),
    ),
    Fault(
        "holm-steps", COLLECTION, "np.maximum.accumulate(np.asarray(p_values)[order] * factors)",
        "(np.asarray(p_values)[order] * factors)", "corrected p-values may fall",
        (f"{OF_COLLECTION}::test_holm",),
    ),
    Fault(
        "one-direction", COLLECTION, 'alternative="two-sided"', 'alternative="greater"',
        "a collection whose scores are lower is not found", (f"{OF_COLLECTION}::test_either_direction_counts",),
    ),
    Fault(
        "judged-on-the-known", COLLECTION, "model.decision_function(x[~known & is_member])",
        "model.decision_function(x[known & is_member])", "members are judged by what was fitted to them",
        (f"{OF_COLLECTION}::test_what_was_learned_is_judged_on_other_documents",),
    ),
    Fault(
        "p-value-of-zero", CHECKS, "(as_strong + 1) / (permutations + 1)", "as_strong / permutations",
        "the p-value leaves the observed labels out",
        (f"{OF_CHECKS}::test_a_real_difference_has_the_smallest_p_value_there_is",),
    ),
    Fault(
        "one-attack-tried", CHECKS, "(np.abs(auc - 0.5) / factors).max(axis=1)", "(np.abs(auc - 0.5) / factors)[:, 0]",
        "the p-value is that of the first attack",
        (f"{OF_CHECKS}::test_the_p_value_of_the_strongest_attack_counts_all_that_were_tried",
         f"{OF_CHECKS}::test_a_real_difference_has_the_smallest_p_value_there_is"),
    ),
    Fault(
        "widening-left-out", CHECKS, "np.abs(auc - 0.5) / factors", "np.abs(auc - 0.5)",
        "attacks that learned from the labels are taken for fixed scores",
        (f"{OF_CHECKS}::test_the_p_value_holds_for_attacks_that_learned_from_the_labels",),
    ),
    Fault(
        "blind-void", CHECKS, "return self.low > 0.5", "return self.auc > 0.5", "sound audits are called void",
        (f"{OF_CHECKS}::test_sound_splits_are_hardly_ever_called_void",
         f"{OF_CHECKS}::test_a_bag_of_words_cannot_tell_two_samples_of_one_distribution"),
    ),
    Fault(
        "min-k-highest", RAGGED, "in_order[first:end].sort()", "in_order[first:end] = -np.sort(-in_order[first:end])",
        "the likeliest tokens are taken", OF_RAGGED,
    ),
    Fault(
        "min-k-rounded-up", RAGGED, "np.floor(share * lengths + ROUNDING)", "np.ceil(share * lengths - ROUNDING)",
        "one token more is taken where the share is not whole", OF_RAGGED,
    ),
    Fault(
        "plus-plus-mean", ATTACKS, "(target.log_prob.astype(np.float64) - target.mean_log_prob) / sigma",
        "target.log_prob.astype(np.float64) / sigma", "Min-K%++ leaves the mean over the vocabulary out", OF_ATTACKS,
    ),
    Fault(
        "plus-plus-variance", ATTACKS, "np.sqrt(target.var_log_prob.astype(np.float64))",
        "target.var_log_prob.astype(np.float64)", "Min-K%++ divides by the variance", OF_ATTACKS,
    ),
    Fault(
        "zlib", ATTACKS, "-target.mean_loss / context.zlib_for(target)", "-target.mean_loss * context.zlib_for(target)",
        "the loss is multiplied by the compressed bytes", OF_ATTACKS,
    ),
    Fault(
        "ref-sign", ATTACKS, "context.reference_for(target).mean_loss - target.mean_loss",
        "target.mean_loss - context.reference_for(target).mean_loss", "a member has a low score", OF_ATTACKS,
    ),
    Fault(
        "windows-across-documents", "dualtok/audit/token_attacks.py", "(window > 0) & (left >= size)", "window > 0",
        "windows reach into the next document", OF_ATTACKS,
    ),
    Fault(
        "error-zone", "dualtok/audit/token_attacks.py", "np.where(target.top1, 0.0, _gain(target, context))",
        "np.where(target.top1, _gain(target, context), 0.0)", "tokens that the model gets right are looked at",
        OF_ATTACKS,
    ),
    Fault(
        "lira-normalisation", LIRA, "np.log(fit.sigma_out / fit.sigma_in)", "np.log(fit.sigma_in / fit.sigma_out)",
        "the Gaussians' heights change places", OF_LIRA,
    ),
    Fault(
        "lira-variance", LIRA, "((side - mean) ** 2).sum() / (count - 1).sum()",
        "((side - mean) ** 2).sum() / count.sum()",
        "the shared deviation is not corrected for the means", OF_LIRA,
    ),
    Fault(
        "lira-sides", LIRA, "for chosen in (inside, ~inside)", "for chosen in (~inside, inside)",
        "shadows that learned a document count as those that did not", OF_LIRA,
    ),
    Fault(
        "cross-fit-leak", CROSSFIT, "clone(model).fit(x[~judged], is_member[~judged])",
        "clone(model).fit(x, is_member)",
        "documents are judged by a classifier that saw them", (f"{TESTS}/test_crossfit.py",),
    ),
    Fault(
        "epsilon-tail", EPSILON, "scipy.stats.binom.sf(correct - 1, guesses, rate)",
        "scipy.stats.binom.sf(correct, guesses, rate)", "the bound counts one right guess too many", OF_EPSILON,
    ),
    Fault(
        "epsilon-delta", EPSILON, "tail += 2 * canaries * delta", "tail += canaries * delta",
        "delta counts half", OF_EPSILON,
    ),
    Fault(
        "epsilon-choice", EPSILON, "1 - (1 - confidence) / (len(scores) * len(guesses))", "confidence",
        "the choice of scores and guesses is not paid for", OF_EPSILON,
    ),
    Fault(
        "exposure-ties", EXPOSURE, "np.count_nonzero(others <= own[:, None], axis=1)",
        "np.count_nonzero(others < own[:, None], axis=1)", "a model that says nothing exposes secrets", OF_EXPOSURE,
    ),
    Fault(
        "exposure-rank", EXPOSURE, "rank = 1 + np.count_nonzero(others <=", "rank = 2 + np.count_nonzero(others <=",
        "the likeliest secret has rank 2", OF_EXPOSURE,
    ),
    Fault(
        "strongest-not-corrected", EVALUATE, "1 - (1 - config.confidence) / n_attacks", "config.confidence",
        "the strongest attack's interval ignores that many were tried", OF_EVALUATE,
    ),
    Fault(
        "histogram-sign", EVALUATE, "context.reference_for(target).log_prob.astype(np.float64) - target.log_prob",
        "target.log_prob - context.reference_for(target).log_prob.astype(np.float64)",
        "the histogram of s is mirrored", OF_EVALUATE,
    ),
    Fault(
        "loss-gap-sign", EVALUATE, "_token_mean_loss(targets[1]) - _token_mean_loss(targets[0])",
        "_token_mean_loss(targets[0]) - _token_mean_loss(targets[1])", "the loss gap has the wrong sign", OF_EVALUATE,
    ),
)  # fmt: skip
