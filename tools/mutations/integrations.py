"""Faults in the trainers of other libraries: what they scale, drop, round or shift."""

from __future__ import annotations

from mutations.fault import Fault

ROOM = "dualtok/integrations/transformers"
COLLATOR, FUNCTION, SCORING = f"{ROOM}/collator.py", f"{ROOM}/loss_function.py", f"{ROOM}/scoring.py"
TRAINER, LOSSES, PRIVACY = f"{ROOM}/trainer.py", f"{ROOM}/token_losses.py", f"{ROOM}/privacy.py"
TESTS = "tests/integrations/transformers"
OF_TRAINER, OF_COLLATOR = f"{TESTS}/test_trainer.py", f"{TESTS}/test_collator.py"
OF_SCORING, OF_PRIVACY = f"{TESTS}/test_scoring.py", f"{TESTS}/test_privacy.py"

INTEGRATIONS: tuple[Fault, ...] = (
    Fault(
        "accumulation-not-divided",
        TRAINER,
        "self.model_accepts_loss_kwargs = False",
        "self.model_accepts_loss_kwargs = True",
        "the loss of a step is the sum of its micro-batches' means",
        (f"{OF_TRAINER}::test_the_trainers_gradient_is_that_of_plain_torch",),
    ),
    Fault(
        "function-naive-mean",
        FUNCTION,
        "return outcome.loss * (tokens / items.clamp(min=1)).float()",
        "return outcome.loss",
        "a naive mean, as many times too large as there are micro-batches",
        (f"{OF_TRAINER}::test_the_loss_functions_gradient_and_loss_are_those_of_plain_torch",),
    ),
    Fault(
        "reference-not-shifted",
        TRAINER,
        'return {"labels": labels, REFERENCE_LOSS: aligned_with_predictions(reference, 0.0)}',
        'return {"labels": labels, REFERENCE_LOSS: reference}',
        "each token is compared with the reference's loss on the one before",
        (f"{OF_TRAINER}::test_the_trainers_gradient_is_that_of_plain_torch",),
    ),
    Fault(
        "evaluation-of-half-the-tokens",
        TRAINER,
        "tokens = ranks.sum((labels != IGNORED_LABEL)",
        "tokens = ranks.sum((labels >= 64)",
        "the evaluation loss is divided by another number of tokens",
        (f"{OF_TRAINER}::test_evaluation_reports_the_plain_loss",),
    ),
    Fault(
        "next-example-predicted",
        COLLATOR,
        '    found["labels"][0] = IGNORED_LABEL\n    found["labels"][found["position_ids"] == 0] = IGNORED_LABEL\n',
        "",
        "in a packed row an example's last token predicts the next example",
        (f"{OF_COLLATOR}::test_examples_are_packed_and_no_token_predicts_the_next_example",),
    ),
    Fault(
        "cache-without-weights",
        SCORING,
        "whole = hashlib.sha256(weights.encode())",
        "whole = hashlib.sha256()",
        "another reference gets the cached losses of the first",
        (f"{OF_SCORING}::test_the_cache_knows_weights_and_tokens",),
    ),
    Fault(
        "members-and-others-swapped",
        PRIVACY,
        "roc_auc(-calibrated[0].numpy(), -calibrated[1].numpy())",
        "roc_auc(calibrated[0].numpy(), calibrated[1].numpy())",
        "the Ref attack takes members for the others",
        (f"{OF_PRIVACY}::test_the_figures_are_those_of_the_documents",),
    ),
)
