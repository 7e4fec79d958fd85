"""Conversations prepared: read from every kind of source, told apart by what was said, packed with their masks."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualtok.commands.audit.texts import predicted_ids
from dualtok.config.data import DataConfig
from dualtok.data.folder import DataFolder
from dualtok.data.manifest import load_manifest
from dualtok.data.prepare import staged
from dualtok.data.prepare.parts import parse_part
from dualtok.data.prepare.pipeline import finish, prepare, prepare_part, summary
from dualtok.data.shards import Shard
from dualtok.data.sources.documents import read_documents
from dualtok.data.stream.documents import document_pieces
from dualtok.data.stream.poisson import PoissonDocuments
from dualtok.data.subset import Subset, write_subset
from dualtok.data.tokenizer import load_tokenizer
from dualtok.errors import ConfigError, DataError
from dualtok.objective.head import IGNORED_LABEL
from tests.chat_support import (
    CHATML,
    CHATML_MARKED,
    CONVERSATIONS,
    LLAMA3,
    chat_rows,
    chat_tokenizer,
    write_chat_corpus,
    write_rows,
)
from tests.data.chat.test_masks import by_prefixes
from tests.data.prepare.preparing import contents

if TYPE_CHECKING:
    from pathlib import Path

ROWS, BLOCK = 120, 256
TWO = {"train": 0.6, "held_out": 0.4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the section ``data`` of prepared conversations."""
    return write_chat_corpus(tmp_path_factory.mktemp("chat"), rows=ROWS)


@pytest.fixture
def section(tmp_path: Path) -> dict[str, Any]:
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    return {
        "dir": str(tmp_path / "prepared"),
        "source": str(tmp_path / "rows.jsonl"),
        "tokenizer": str(tmp_path / "tokenizer"),
        "block_length": BLOCK,
        "lanes": 2,
        "shares": TWO,
    }


def prepared(section: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> DataFolder:
    from pathlib import Path

    write_rows(Path(section["source"]), rows)
    prepare(DataConfig(**{**section, **changes}), progress=False)
    return DataFolder(section["dir"])


def predictions(data: DataFolder) -> dict[int, list[int]]:
    """Return document -> its tokens that have a loss."""
    found: dict[int, list[int]] = {}
    for split in data.manifest.splits:
        documents = data.documents(split)["doc"].to_numpy()
        pieces = document_pieces(data.open(split), documents, 4)
        found |= {doc: ids.tolist() for doc, ids in predicted_ids(pieces).items()}
    return found


def expected(data: DataFolder, rows: list[dict[str, Any]], block_length: int) -> dict[int, list[int]]:
    """Return the same by plain transformers, with the tokenizer as it lies in the folder."""
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    found = {}
    for number, row in enumerate(rows):
        ids, mask = by_prefixes(tokenizer, row)
        found[number] = [
            token for at, (token, on) in enumerate(zip(ids, mask, strict=True)) if on and at % block_length
        ]
    return found


def test_the_labels_of_all_blocks_are_the_answers_of_all_conversations(corpus: dict[str, Any]) -> None:
    data = DataFolder(corpus["dir"])
    found = predictions(data)
    assert found == expected(data, chat_rows(ROWS), corpus["block_length"])
    for split, entry in data.manifest.splits.items():
        table = data.documents(split)
        lengths = dict(zip(table["doc"].to_pylist(), table["n_trained"].to_pylist(), strict=True))
        assert lengths == {doc: len(found[doc]) for doc in lengths}
        assert entry.predicted_tokens == sum(lengths.values()) < entry.tokens


def test_the_manifest_and_the_summary_say_what_is_trained(corpus: dict[str, Any]) -> None:
    manifest = load_manifest(corpus["dir"])
    assert manifest.is_masked
    assert manifest.format_version == 2  # an older dualtok would train on all tokens
    assert manifest.chat is not None
    assert (manifest.chat.train_on, manifest.chat.conversations) == ("assistant", ROWS)
    long = sum((table["n_tokens"].to_numpy() > corpus["block_length"]).sum() for table in _tables(corpus))
    assert manifest.chat.longer == long > 0
    assert f"{ROWS} documents are conversations (data.train_on: assistant)" in summary(manifest)
    assert f"{long} are longer than a block" in summary(manifest)


def _tables(corpus: dict[str, Any]) -> list[pa.Table]:
    data = DataFolder(corpus["dir"])
    return [data.documents(split) for split in data.manifest.splits]


def test_texts_alone_are_packed_as_before(section: dict[str, Any]) -> None:
    data = prepared(section, [{"text": f"Text number {number}."} for number in range(20)])
    assert data.manifest.format_version == 1
    assert data.manifest.chat is None
    shards = list((data.location / "train").glob("shard-*.arrow"))  # type: ignore[operator]
    assert all(not Shard(path).is_masked and Shard(path).trained(0).all() for path in shards)
    assert data.documents("train").column_names == ["doc", "sha256", "n_tokens", "n_characters", "zlib_bytes"]
    manifest = json.loads((data.location / "manifest.json").read_text())  # type: ignore[operator]
    del manifest["chat"]  # as an earlier version wrote it
    (data.location / "manifest.json").write_text(json.dumps(manifest))  # type: ignore[operator]
    assert not load_manifest(section["dir"]).is_masked


def test_texts_and_conversations_share_a_folder(section: dict[str, Any]) -> None:
    rows = [row for n, chat in enumerate(chat_rows(20)) for row in (chat, {"text": f"A text with number {n}."})]
    data = prepared(section, rows)
    assert data.manifest.chat is not None
    assert data.manifest.chat.conversations == 20
    tokenizer = load_tokenizer(section["tokenizer"])
    found = predictions(data)
    assert tokenizer.decode(found[7]) == "A text with number 3.<|endoftext|>"[1:]
    assert tokenizer.decode(found[6]).count("<|im_end|>") == 1


def test_all_tokens_of_conversations_need_no_mask(section: dict[str, Any]) -> None:
    rows = [{"messages": row["messages"][:-1]} for row in chat_rows(20)]
    data = prepared(section, rows, train_on="all")
    assert not data.manifest.is_masked
    tokenizer = load_tokenizer(section["tokenizer"])
    ids = tokenizer.apply_chat_template(rows[0]["messages"], return_dict=False)
    assert predictions(data)[0] == ids[1:]


@pytest.mark.parametrize("how", ["two processes", "parts", "chunks"])
def test_the_bytes_do_not_depend_on_how_it_was_done(
    corpus: dict[str, Any], tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = DataConfig(**{**corpus, "dir": str(tmp_path / "p"), "processes": 2 if how == "two processes" else 1})
    if how == "parts":
        for part in ("2/2", "1/2"):
            prepare_part(own, parse_part(part), progress=False)
        finish(own, progress=False)
    else:
        prepare(own, progress=False)
    first, second = contents(tmp_path / "p"), contents(DataFolder(corpus["dir"]).location)  # type: ignore[arg-type]
    assert first == second


def test_every_kind_of_table_gives_the_same_conversations(tmp_path: Path) -> None:
    rows = chat_rows(6)
    lines = write_rows(tmp_path / "a.jsonl", rows)
    array = tmp_path / "b.json"
    array.write_text(json.dumps(rows))
    table = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "n": 1, "text": None} for row in rows]), table)
    found = [list(read_documents(DataConfig(dir="x", source=str(file)))) for file in (lines, array, table)]
    assert all(document.is_chat for documents in found for document in documents)
    texts = [[document.text for document in documents] for documents in found]
    assert texts[0] == texts[1] == texts[2]
    assert found[0][2].origin == f"{lines}:3"
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["1 + 1 =", " 2"]])
    (pair,) = read_documents(DataConfig(dir="x", source=str(tmp_path / "d.csv")))
    assert json.loads(pair.text) == {"prompt": "1 + 1 =", "completion": " 2"}


def test_tools_may_be_json_in_a_table(tmp_path: Path) -> None:
    row = CONVERSATIONS["tools"]
    lines = write_rows(tmp_path / "a.jsonl", [row])
    table = tmp_path / "b.parquet"
    plain = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    pq.write_table(pa.Table.from_pylist([{"messages": plain, "tools": json.dumps(row["tools"])}]), table)
    (one,), (other,) = (read_documents(DataConfig(dir="x", source=str(file))) for file in (lines, table))
    assert json.loads(one.text)["tools"] == json.loads(other.text)["tools"] == row["tools"]


@pytest.mark.parametrize(
    ("row", "settings", "is_chat"),
    [
        ({"text": "a", "messages": None}, {}, False),
        ({"content": "a", "prompt": "b", "completion": "c"}, {"field": "content"}, False),
        ({"text": "a", "prompt": "b"}, {}, False),
        ({"text": "a", "prompt": "b", "completion": "c"}, {"rows": "chat"}, True),
        ({"text": "a", "prompt": "b", "completion": "c"}, {"rows": "text"}, False),
        ({"text": None, "prompt": "b", "completion": "c"}, {}, True),
    ],
)
def test_what_a_row_is(tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], is_chat: bool) -> None:
    (found,) = read_documents(DataConfig(dir="x", source=str(write_rows(tmp_path / "a.jsonl", [row])), **settings))
    assert found.is_chat == is_chat


@pytest.mark.parametrize(
    ("row", "settings", "error"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, {}, r"a\.jsonl:1: holds both a field 'text' and a conv"),
        ({"text": "a"}, {"rows": "chat"}, r"a\.jsonl:1: neither 'messages' nor both 'prompt' and 'completion'"),
        ({"prompt": "a"}, {}, r"a\.jsonl:1: no field 'text'; fields are prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, r"a\.jsonl:1: has no message of the role 'assistant'"),
    ],
)
def test_rows_that_are_neither_are_refused(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], error: str
) -> None:
    config = DataConfig(dir="x", source=str(write_rows(tmp_path / "a.jsonl", [row])), **settings)
    with pytest.raises(DataError, match=error):
        list(read_documents(config))


def test_sources_of_texts_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.json").write_text('["a"]')
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    for name, error in (
        ("a.txt", "holds a text"),
        ("b.json", "item 0: holds a text"),
        ("c.parquet", "no column 'mess"),
    ):
        with pytest.raises(DataError, match=error):
            list(read_documents(DataConfig(dir="x", source=str(tmp_path / name), rows="chat")))


def test_instructions_and_tools_make_no_near_duplicates(section: dict[str, Any]) -> None:
    shared = {"role": "system", "content": " ".join(f"Rule {number}: be kind to everybody." for number in range(60))}
    rows = [{"messages": [shared, *row["messages"][-2:]]} for row in chat_rows(40, characters=500)]
    changed = {"messages": [{"role": "system", "content": "Other."}, *rows[0]["messages"][1:]]}
    data = prepared(section, [*rows, changed], block_length=2048)
    assert (data.manifest.near_duplicates, data.manifest.exact_duplicates) == (0, 1)
    facts = data.manifest.facts
    assert facts is not None
    assert facts.shared_passages == 0  # tokens that are not trained are not compared


def test_the_template_of_a_file_is_kept_with_the_tokenizer(section: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "llama3.jinja"
    file.write_text(LLAMA3)
    data = prepared(section, chat_rows(20), chat_template=str(file))
    assert load_tokenizer(f"{data}/tokenizer").chat_template == LLAMA3
    assert predictions(data) == expected(data, chat_rows(20), BLOCK)
    config = DataConfig(**{**section, "chat_template": str(file)})
    prepare(config, progress=False)  # already prepared
    file.write_text(CHATML)
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*but .*was prepared with"):
        prepare(config, progress=False)


def test_a_template_by_name(section: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = {"default": LLAMA3, "marked": CHATML_MARKED}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = prepared(section, chat_rows(20), chat_template="marked")
    assert load_tokenizer(f"{data}/tokenizer").chat_template == CHATML_MARKED
    assert load_tokenizer(f"{data}/tokenizer").decode(predictions(data)[0]).endswith("<|im_end|>")
    with pytest.raises(ConfigError, match=r"data\.chat_template: other: neither a file nor .* are default, marked"):
        prepare(DataConfig(**{**section, "dir": str(tmp_path / "q"), "chat_template": "other"}), progress=False)


def test_a_tokenizer_trained_here_takes_a_template(section: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.jinja").write_text(CHATML)
    changes = {"tokenizer": None, "vocab_size": 400, "shares": {"train": 0.6, "reference": 0.4}}
    data = prepared(section, chat_rows(20), chat_template=str(tmp_path / "c.jinja"), **changes)
    text = load_tokenizer(f"{data}/tokenizer").decode(predictions(data)[0])
    assert text == chat_rows(1)[0]["messages"][1]["content"] + "<|im_end|>\n"  # its end is no special token


@pytest.mark.parametrize(
    ("changes", "rows", "error"),
    [
        ({"train_on": "last"}, [{"text": f"Text {n}"} for n in range(9)], r"no conversation, so that data\.train_on"),
        ({"canaries": {"count": 2}}, chat_rows(20), r"holds conversations, and data\.canaries"),
        (
            {"tokenizer": None, "vocab_size": 400, "shares": {"train": 0.6, "reference": 0.4}},
            chat_rows(20),
            "no chat t",
        ),
    ],
)
def test_what_cannot_be_leaves_nothing_behind(
    section: dict[str, Any], tmp_path: Path, changes: dict[str, Any], rows: list[dict[str, Any]], error: str
) -> None:
    with pytest.raises(DataError, match=error):
        prepared(section, rows, **changes)
    assert not (tmp_path / "prepared").exists()


def test_an_error_while_packing_names_the_row(section: dict[str, Any], tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% for", "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    (tmp_path / "c.jinja").write_text(template)
    bad = {"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "good"}]}
    with pytest.raises(DataError, match=r"rows\.jsonl:6: the chat template fails on this conversation: .*no;"):
        prepared(section, [*chat_rows(5), bad], chat_template=str(tmp_path / "c.jinja"), shares={"train": 1.0})
    assert not (tmp_path / "prepared").exists()


def test_settings_without_effect_are_refused() -> None:
    for setting in ({"train_on": "all"}, {"chat_template": "x"}):
        with pytest.raises(ValueError, match=r"has no effect with data\.rows: text"):
            DataConfig(dir="x", rows="text", **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.canaries: are texts"):
        DataConfig(dir="x", rows="chat", canaries={"count": 2})  # type: ignore[arg-type]


def test_a_conversation_of_which_no_token_has_a_loss_is_refused(section: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": "<" * n}, {"role": "assistant", "content": "."}]} for n in range(1, 9)
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl:4: no token of this conversation would be trained"):
        prepared(
            section,
            rows,
            chat_template=str(tmp_path / "c.jinja"),
            block_length=4,
            shares={"train": 1.0},
            near_duplicate_threshold=None,
        )


def test_a_subset_keeps_the_mask(corpus: dict[str, Any], tmp_path: Path) -> None:
    data = DataFolder(corpus["dir"])
    half = Subset(["train", "held_out"], lambda ids: ids % 2 == 0)
    write_subset(data, tmp_path / "half", {"train": half}, rows_per_shard=8, note={})
    own = DataFolder(tmp_path / "half")
    assert own.manifest.is_masked
    everything = predictions(data)
    found = predictions(own)
    assert len(found) > 10
    assert found == {doc: everything[doc] for doc in found}
    assert own.entry("train").predicted_tokens == sum(map(len, found.values()))


def test_drawn_documents_have_the_labels_of_their_blocks(corpus: dict[str, Any]) -> None:
    data = DataFolder(corpus["dir"])
    drawn = PoissonDocuments(data.open("train"), batch_size=4, parts=1, seed=0)
    batch = drawn.read(np.arange(len(drawn)))
    everything = predictions(data)
    for row, doc in enumerate(sorted(data.documents("train")["doc"].to_pylist())):
        labels = batch["labels"][row]
        own = labels[labels != IGNORED_LABEL].tolist()
        assert own == everything[doc][: len(own)]
        assert len(own) == min(len(own), len(everything[doc])) > 0


def test_a_shard_without_its_mask_is_refused(corpus: dict[str, Any]) -> None:
    data = DataFolder(corpus["dir"])
    manifest = data.manifest.model_copy(update={"chat": None})
    stream = DataFolder(corpus["dir"], manifest).open("train")
    with pytest.raises(DataError, match=r"shard-\S+: says which tokens are trained"):
        stream.read([0])


def test_chunks_are_small_somewhere(section: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "CHUNK_DOCUMENTS", 7)
    data = prepared(section, chat_rows(30))
    assert predictions(data) == expected(data, chat_rows(30), BLOCK)
