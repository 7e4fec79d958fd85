"""What the audit reads of documents: their predicted tokens, and how often tokens occur in the attacker's corpus."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dualtok.audit.settings import AuditConfig
from dualtok.commands.audit.texts import attacker_frequencies, predicted_ids
from dualtok.data.folder import DataFolder
from dualtok.data.stream.documents import document_pieces
from dualtok.objective.head import IGNORED_LABEL
from tests.support import VOCABULARY


def test_predicted_ids_are_the_labels_in_the_order_of_the_document(small_corpus: dict[str, Any]) -> None:
    data = DataFolder(small_corpus["dir"])
    stream, table = data.open("held_out"), data.documents("held_out")
    n_tokens = dict(zip(table["doc"].to_pylist(), table["n_tokens"].to_pylist(), strict=True))
    wanted = np.array(sorted(n_tokens)[::2])
    pieces = document_pieces(stream, wanted, 3)
    assert list(pieces) == wanted.tolist()
    assert any(len(parts) > 1 for parts in pieces.values()), "some documents lie in several blocks"
    predicted = predicted_ids(pieces)
    labels: dict[int, dict[int, list[int]]] = {}
    for batch, rows in stream.sequential(1):
        column = 0
        for document, start, length in rows[0]:
            own = batch["labels"][0, column : column + length]
            labels.setdefault(document, {})[start] = own[own != IGNORED_LABEL].tolist()
            column += length
    for document in wanted.tolist():
        assert sum(len(piece.ids) for piece in pieces[document]) == n_tokens[document]
        assert predicted[document].tolist() == [
            t for start in sorted(labels[document]) for t in labels[document][start]
        ]


def test_frequencies_are_of_the_attackers_split_and_never_of_members(small_corpus: dict[str, Any]) -> None:
    def of(**audit: Any) -> Any:
        return attacker_frequencies(DataFolder(small_corpus["dir"]), AuditConfig(**audit))

    def counted(split: str) -> list[float]:
        counts: Counter[int] = Counter()
        for batch, _ in DataFolder(small_corpus["dir"]).open(split, seed=1).sequential(1):
            counts.update(t for t in batch["labels"].flatten().tolist() if t != IGNORED_LABEL)
        return [(counts[token] + 1) / (counts.total() + VOCABULARY) for token in range(VOCABULARY)]

    np.testing.assert_allclose(of(), counted("attack_reference"), rtol=1e-12)
    np.testing.assert_allclose(of(members="attack_reference"), counted("reference"), rtol=1e-12)
    assert of(members="attack_reference", non_members="reference") is None
