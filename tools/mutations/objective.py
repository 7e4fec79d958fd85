"""Faults in the science: which tokens are learned and unlearned, how much each counts, and the loss itself."""

from __future__ import annotations

from mutations.fault import Fault

TESTS = "tests/objective"
CALIBRATE, GOLDFISH = "dualtok/objective/calibrate.py", "dualtok/objective/goldfish.py"
HEAD, KERNEL = "dualtok/objective/head.py", "dualtok/objective/linear_cross_entropy.py"
LOSS, PLAN, SELECTION = "dualtok/objective/loss.py", "dualtok/objective/plan.py", "dualtok/objective/selection.py"
OF_CALIBRATE, OF_GOLDFISH = (f"{TESTS}/test_calibrate.py",), (f"{TESTS}/test_goldfish.py",)
OF_SELECTION, OF_LOSS = (f"{TESTS}/test_selection.py",), (f"{TESTS}/test_loss.py",)
OF_PARITY, OF_KERNEL = (f"{TESTS}/test_parity.py",), (f"{TESTS}/test_linear_cross_entropy.py",)

OBJECTIVE: tuple[Fault, ...] = (
    Fault(
        "s-sign", CALIBRATE, "return token_loss.detach().float() - reference_loss.detach().float()",
        "return reference_loss.detach().float() - token_loss.detach().float()",
        "s(t) is the reference minus the model", OF_CALIBRATE,
    ),
    Fault(
        "s-gradient", CALIBRATE, "return token_loss.detach().float()", "return token_loss.float()",
        "the selection takes a gradient", OF_CALIBRATE,
    ),
    Fault(
        "hard-are-the-lowest", SELECTION, "descending=True, stable=True", "descending=False, stable=True",
        "the lowest scores are learned", OF_SELECTION,
    ),
    Fault(
        "sets-swapped", SELECTION, "return Selection(hard_n, memorised_n,", "return Selection(memorised_n, hard_n,",
        "hard and memorised tokens change places", OF_SELECTION,
    ),
    Fault(
        "share-rounded-up", SELECTION, "math.floor(share * n + ROUNDING)", "math.ceil(share * n - ROUNDING)",
        "a share that is not whole is one token larger", OF_SELECTION,
    ),
    Fault(
        "rounding-not-forgiven", SELECTION, "math.floor(share * n + ROUNDING)", "math.floor(share * n)",
        "0.29 of 100 tokens are 28", OF_SELECTION,
    ),
    Fault(
        "tau-included", SELECTION, "scores_n[lowest] < tau", "scores_n[lowest] <= tau",
        "a score equal to tau is unlearned", OF_SELECTION,
    ),
    Fault(
        "hard-may-be-empty", SELECTION, "n_hard = max(n_hard, 1)", "n_hard = max(n_hard, 0)",
        "a lone token is not learned", OF_SELECTION,
    ),
    Fault(
        "ties-from-the-end", SELECTION, "rest[torch.sort(scores_n[rest], stable=True).indices[:n_memorised]]",
        "order.flip(0)[:n_memorised]", "of equal scores the later ones are unlearned first", OF_SELECTION,
    ),
    Fault(
        "nan-ranked", SELECTION, "valid = full_mask(part, mask) & ~values.isnan()", "valid = full_mask(part, mask)",
        "a NaN takes part in the ranking", OF_SELECTION,
    ),
    Fault(
        "mask-inverted", SELECTION, "return mask.bool()", "return ~mask.bool()", "masked tokens are taken, others not",
        OF_SELECTION,
    ),
    Fault(
        "offset-of-the-rank", SELECTION, "slice(start + offset, start + offset + len(own_m))",
        "slice(start, start + len(own_m))", "each rank takes the selection of the first", OF_SELECTION,
    ),
    Fault(
        "alpha-sign", PLAN, "hard.float() - alpha * _one_over(unlearned)",
        "hard.float() + alpha * _one_over(unlearned)",
        "memorised tokens are learned", OF_LOSS,
    ),
    Fault(
        "world-size-twice", PLAN, "len(selections) * world_size_of(gather, scores[0].device)",
        "len(selections) * world_size_of(gather, scores[0].device) ** 2", "the loss is scaled by the ranks twice",
        OF_PARITY,
    ),
    Fault(
        "world-size-never", PLAN, "len(selections) * world_size_of(gather, scores[0].device)", "len(selections)",
        "the loss is not scaled by the ranks", OF_PARITY,
    ),
    Fault(
        "parts-never", PLAN, "len(selections) * world_size_of(gather, scores[0].device)",
        "world_size_of(gather, scores[0].device)", "with scope step the loss shrinks with accumulation", OF_PARITY,
    ),
    Fault(
        "plain-world-size-never", PLAN, "len(sizes) * _one_over(kept)", "_one_over(kept)",
        "plain training's loss is not scaled by the ranks", OF_PARITY,
    ),
    Fault(
        "normalize-mistaken", PLAN, 'per_share = normalize == "per_share"', 'per_share = normalize == "per_set"',
        "the two ways to average the memorised tokens change places", OF_LOSS,
    ),
    Fault(
        "masked-nan-in-the-loss", PLAN, "(torch.where(plan.predicted, token_loss.float(), 0.0) * plan.weights)",
        "(token_loss.float() * plan.weights)", "a NaN in a masked position reaches the loss", OF_LOSS,
    ),
    Fault(
        "totals-swapped", PLAN, "mask, hard, memorised, s, counts, _totals(losses, hard, memorised, mask)",
        "mask, hard, memorised, s, counts, _totals(losses, memorised, hard, mask)",
        "the losses reported of both sets change places", OF_LOSS,
    ),
    Fault(
        "local-communicates", LOSS, 'None if self.config.scope == "local" else gather', "gather",
        "scope local ranks all tokens", OF_LOSS,
    ),
    Fault(
        "labels-inverted",
        LOSS, 'return (batch["labels"] != IGNORED_LABEL)', 'return (batch["labels"] == IGNORED_LABEL)',
        "positions without a label are the predicted ones", OF_LOSS,
    ),
    Fault(
        "selective-unlearns", LOSS, "memorised_share=0.0, alpha=0.0, scope=self.config.scope",
        "memorised_share=self.config.memorised_share, alpha=self.config.alpha, scope=self.config.scope",
        "the objective selective unlearns too", OF_LOSS,
    ),
    Fault(
        "tau-not-passed", LOSS, "tau=settings.tau,", "tau=0.0,", "selection.tau has no effect", OF_LOSS,
    ),
    Fault(
        "goldfish-inverted", GOLDFISH, "(labels != IGNORED_LABEL) & ~dropped", "(labels != IGNORED_LABEL) & dropped",
        "the Goldfish loss learns what it should drop", OF_GOLDFISH,
    ),
    Fault(
        "goldfish-window", GOLDFISH, "(position_ids + 1 >= context)", "(position_ids >= context)",
        "the first token with a whole context is never dropped", OF_GOLDFISH,
    ),
    Fault(
        "goldfish-context", GOLDFISH, "range(context - 1, -1, -1)", "range(context - 2, -1, -1)",
        "the hash covers one token less", OF_GOLDFISH,
    ),
    Fault(
        "kernel-one-hot", KERNEL, "block.new_full((len(block), 1), -1.0)", "block.new_full((len(block), 1), -0.99)",
        "the label's part of the gradient is 1 % too small", OF_KERNEL,
    ),
    Fault(
        "kernel-softcap", KERNEL, "1.0 - (scaled / self.softcap).square()", "1.0 - (scaled / self.softcap)",
        "the soft cap has a wrong derivative", OF_KERNEL,
    ),
    Fault(
        "kernel-factor", KERNEL, "weight_c=gradient_r[chosen_c] * scaling.factor", "weight_c=gradient_r[chosen_c]",
        "the gradient leaves the logits' factor out", OF_KERNEL,
    ),
    Fault(
        "kernel-descent-alone", KERNEL, "selected_s = gradient_r.nonzero()", "selected_s = (gradient_r > 0).nonzero()",
        "tokens with a negative weight get no gradient", OF_KERNEL,
    ),
    Fault(
        "kernel-low-precision-sum", KERNEL, "_wide(parameter) if chunks > 1 else parameter.dtype", "parameter.dtype",
        "many small gradients drown in a low-precision sum", OF_KERNEL,
    ),
    Fault(
        "kernel-bias", KERNEL, "torch.addmm(bias_v, hidden_cd,", "torch.addmm(torch.zeros_like(bias_v), hidden_cd,",
        "the output layer's bias is left out", OF_KERNEL,
    ),
    Fault(
        "head-low-precision", HEAD, "cross_entropy(logits_cv.float(), targets_c,",
        "cross_entropy(logits_cv, targets_c,",
        "losses are reduced in the logits' own precision", (f"{TESTS}/test_head.py",),
    ),
)  # fmt: skip
