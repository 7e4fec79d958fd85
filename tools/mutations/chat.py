"""Faults in what is trained of conversations."""

from __future__ import annotations

from mutations.fault import Fault

CHAT, TESTS = "dualtok/data/chat", "tests/data/prepare/test_chat.py"
OF_MASKS = ("tests/data/chat/test_masks.py",)

CONVERSATIONS: tuple[Fault, ...] = (
    Fault(
        "mask-not-shifted",
        "dualtok/data/packing.py",
        "labels[:, :-1][~trained[:, 1:]] = IGNORED_LABEL",
        "labels[:, :-1][~trained[:, :-1]] = IGNORED_LABEL",
        "a token is learned if the one before it is trained",
        (f"{TESTS}::test_the_labels_of_all_blocks_are_the_answers_of_all_conversations",),
    ),
    Fault(
        "end-token-untrained",
        f"{CHAT}/tokens.py",
        "trained[first : last + 1] = True",
        "trained[first:last] = True",
        "the token that ends a turn is not trained",
        OF_MASKS,
    ),
    Fault(
        "line-end-trained",
        f"{CHAT}/templates.py",
        "return len(stripped) if stripped.endswith(self._markers) else len(answer)",
        "return len(answer)",
        "white space after the end token is trained",
        OF_MASKS,
    ),
    Fault(
        "prefix-unchecked",
        f"{CHAT}/templates.py",
        "if not (text.startswith(after) and after.startswith(before)):",
        "if not after.startswith(before):",
        "answers are looked for where the whole conversation has others",
        OF_MASKS,
    ),
    Fault(
        "prompt-trained",
        f"{CHAT}/templates.py",
        "marked = marked[len(",
        "marked = marked[0 * len(",
        "answers in a prompt of messages are trained",
        OF_MASKS,
    ),
    Fault(
        "message-ends-its-turn",
        f"{CHAT}/special.py",
        "verbose=False, split_special_tokens=True)",
        "verbose=False, split_special_tokens=False)",
        "what a message spells out becomes a special token",
        OF_MASKS,
    ),
    Fault(
        "instructions-compared",
        f"{CHAT}/conversations.py",
        'if message["role"] in INSTRUCTIONS:',
        "if False:",
        "conversations of one system prompt count as near duplicates",
        (f"{TESTS}::test_instructions_and_tools_make_no_near_duplicates",),
    ),
    Fault(
        "mask-lost-in-subset",
        "dualtok/data/subset.py",
        "trained[doc] = np.concatenate([piece.predicted for piece in pieces])",
        "trained[doc] = np.concatenate([piece.ids >= 0 for piece in pieces])",
        "shadow models learn all tokens of conversations",
        (f"{TESTS}::test_a_subset_keeps_the_mask",),
    ),
    Fault(
        "mask-lost-in-draws",
        "dualtok/data/stream/poisson.py",
        'return {**model_inputs(ids, lengths), "labels": labels}',
        "return model_inputs(ids, lengths)",
        "DP-SGD learns all tokens of conversations",
        (f"{TESTS}::test_drawn_documents_have_the_labels_of_their_blocks",),
    ),
)
