"""Faults in the data and in the reference losses that lie beside it."""

from __future__ import annotations

from mutations.fault import Fault

TESTS = "tests/data"
CACHE, DECIDE, DEDUPLICATE = "dualtok/data/cache.py", "dualtok/data/decide.py", "dualtok/data/deduplicate.py"
FOLDS, MANIFEST, MIXTURE = "dualtok/data/folds.py", "dualtok/data/manifest.py", "dualtok/data/mixture.py"
PACKING, RANKS, SPLITS = "dualtok/data/packing.py", "dualtok/data/rank_batches.py", "dualtok/data/splits.py"
STORAGE, STREAM = "dualtok/data/storage.py", "dualtok/data/stream.py"
FINGERPRINT, STORED = "dualtok/reference/fingerprint.py", "dualtok/reference/stored.py"
OF_PACKING, OF_STREAM = (f"{TESTS}/test_packing.py",), (f"{TESTS}/test_stream.py",)
OF_MIXTURE, OF_CACHE = (f"{TESTS}/test_mixture.py",), (f"{TESTS}/test_cache.py",)
OF_DEDUPLICATE, OF_STORED = (f"{TESTS}/test_deduplicate.py",), ("tests/reference/test_stored.py",)
OF_FOLDS, OF_STORAGE = (f"{TESTS}/test_folds.py",), f"{TESTS}/test_storage.py"

DATA: tuple[Fault, ...] = (
    Fault(
        "labels-not-shifted", PACKING, "labels[:, :-1] = input_ids[:, 1:]", "labels[:, :-1] = input_ids[:, :-1]",
        "each token predicts itself", OF_PACKING,
    ),
    Fault(
        "document-boundary", PACKING, "labels.reshape(-1)[ends - 1] = IGNORED_LABEL", "labels[:, -1] = IGNORED_LABEL",
        "the last token of a piece predicts the next document", OF_PACKING,
    ),
    Fault(
        "padding-predicted", PACKING, "labels[row, first:] = IGNORED_LABEL", "labels[row, first + 1 :] = IGNORED_LABEL",
        "the first token of the padding has a label", OF_PACKING,
    ),
    Fault(
        "positions-run-on", PACKING, "np.repeat(ends - pieces, pieces)", "np.repeat(np.arange(rows) * width, width)",
        "positions do not begin anew with a document", OF_PACKING,
    ),
    Fault(
        "cut-loses-a-token", PACKING, "range(0, length, block_length)", "range(0, length - 1, block_length)",
        "a last piece of one token is lost", OF_PACKING,
    ),
    Fault(
        "bins-over-full", PACKING, "bisect_left(open_bins, (lengths[item], -1))",
        "bisect_left(open_bins, (lengths[item] - 1, -1))", "a block gets one token more than it holds", OF_PACKING,
    ),
    Fault(
        "rank-slice", RANKS, "start_sample + rank * share, stride", "start_sample + rank, stride",
        "ranks read overlapping slices", OF_STREAM,
    ),
    Fault(
        "cursor-stands-still", RANKS, "(self._start + number * self._stride for number in window)",
        "(self._start for number in window)", "every micro-batch is the first", OF_STREAM,
    ),
    Fault(
        "epoch-not-in-lanes", STREAM, "default_rng([self.seed, epoch, lane])", "default_rng([self.seed, 0, lane])",
        "shards come in the same order in every epoch", OF_STREAM,
    ),
    Fault(
        "epoch-not-in-rows", STREAM, "default_rng([self.seed, epoch, entry.lane, number + 1])",
        "default_rng([self.seed, 0, entry.lane, number + 1])", "rows come in the same order in every epoch", OF_STREAM,
    ),
    Fault(
        "seed-not-in-rows", STREAM, "default_rng([self.seed, epoch, entry.lane, number + 1])",
        "default_rng([0, epoch, entry.lane, number + 1])", "the order of rows does not follow the seed", OF_STREAM,
    ),
    Fault(
        "shard-twice", STREAM, "[shards[i].file for i in order]", "[shards[order[0]].file for i in order]",
        "the first shard of a lane is read in place of the others", OF_STREAM,
    ),
    Fault(
        "lane-of-a-sample", STREAM, "lane, position = index % self.lanes, index // self.lanes",
        "lane, position = self.lanes - 1 - index % self.lanes, index // self.lanes",
        "samples come from the lanes in the opposite order", OF_STREAM,
    ),
    Fault(
        "first-blocks-only", STREAM, "np.arange(wanted) * self._blocks // wanted", "np.arange(wanted)",
        "an evaluation of some blocks takes the first ones", OF_STREAM,
    ),
    Fault(
        "losses-shifted", STREAM, "self._scores.read(Path(file).stem, np.array([row]))[0]",
        "np.roll(self._scores.read(Path(file).stem, np.array([row]))[0], 1)",
        "reference losses are one token late",
        OF_STREAM,
    ),
    Fault(
        "hashing-not-shared", STREAM, "number % verify_world_size == verify_rank", "number % verify_world_size == 0",
        "all readers hash the same shards", OF_STREAM,
    ),
    Fault(
        "fold-learned", STREAM, "                if out:\n", "                if not out:\n",
        "the fold to be left out is the one that is learned", OF_FOLDS,
    ),
    Fault(
        "shadows-alike", FOLDS, "== np.uint64(second)", "== np.uint64(0)", "both shadows of a pair learn the same half",
        OF_FOLDS,
    ),
    Fault(
        "shard-checksum", MANIFEST, "if hashed and file_sha256(path) != shard.sha256:",
        "if hashed and not shard.sha256:", "an altered shard is taken for sound", (f"{TESTS}/test_manifest.py",),
    ),
    Fault(
        "near-duplicates-kept", DECIDE, "similarity.max() >= self._threshold", "similarity.max() >= 1.0",
        "only equal signatures are near duplicates", OF_DEDUPLICATE,
    ),
    Fault(
        "dropped-attracts", DECIDE, "kept=fates[place] <= UNUSED", "kept=True",
        "documents that were left out make others be left out", OF_DEDUPLICATE,
    ),
    Fault(
        "unicode-counts", DEDUPLICATE, 'unicodedata.normalize("NFC", text)', "text",
        "one text in two Unicode forms is two documents", OF_DEDUPLICATE,
    ),
    Fault(
        "split-without-seed", SPLITS, "key=str(seed).encode()", 'key=b"0"', "splits do not follow the seed",
        (f"{TESTS}/test_prepare.py::test_a_documents_split_depends_on_its_text_and_the_seed_alone",),
    ),
    Fault(
        "shares-not-summed", SPLITS, "end += shares.get(name, 0.0)", "end = shares.get(name, 0.0)",
        "splits after the first get too few documents",
        (f"{TESTS}/test_prepare.py::test_shares_hold_and_a_document_keeps_its_split_when_the_rest_is_left_out",),
    ),
    Fault(
        "quota-rest", MIXTURE, "by_remainder[: MIX_PERIOD - sum(whole)]", "by_remainder[:0]",
        "a mixture's shares do not fill the period", OF_MIXTURE,
    ),
    Fault(
        "quota-remainder", MIXTURE, "whole[source] - exact[source]", "exact[source] - whole[source]",
        "the smallest remainder is rounded up", OF_MIXTURE,
    ),
    Fault(
        "mixture-repeats", MIXTURE, "position = period * self.quotas[source] + int(", "position = int(",
        "each period of a mixture reads the same blocks", OF_MIXTURE,
    ),
    Fault(
        "cache-eviction", CACHE, "in sorted(whole):", "in sorted(whole, reverse=True):",
        "what was used last is removed first", OF_CACHE,
    ),
    Fault(
        "cache-believed", CACHE, "if sha256 not in self._verified and", "if sha256 in self._verified and",
        "an altered file in the cache is used", OF_CACHE,
    ),
    Fault(
        "one-attempt", STORAGE, "stop_after_attempt(settings.attempts)", "stop_after_attempt(1)",
        "a transfer that fails once is given up", (f"{OF_STORAGE}::test_a_passing_fault_is_tried_again_and_told",),
    ),
    Fault(
        "arrived-altered", STORAGE, "if file_sha256(target) != sha256:", "if not sha256:",
        "what arrives is not compared with its checksum",
        (f"{OF_STORAGE}::test_a_lasting_fault_ends_in_an_error_that_tells_bad_objects_from_a_bad_connection",),
    ),
    Fault(
        "rows-of-a-document", "dualtok/data/shards.py", 'np.searchsorted(self._offsets, hits, side="right") - 1',
        'np.searchsorted(self._offsets, hits, side="left") - 1', "a block's first piece is looked for one block early",
        (f"{TESTS}/test_shards.py",),
    ),
    Fault(
        "coins", "dualtok/data/canaries.py", '_number(config, "coin", number) % 2)',
        '_number(config, "coin", number) % 4)', "three canaries of four are included",
        (f"{TESTS}/test_canaries.py::test_coins_are_fair_independent_and_fixed_by_the_seed",),
    ),
    Fault(
        "fingerprint-weights", FINGERPRINT, '[folder / "config.json", *weight_files(folder), *sorted(',
        '[folder / "config.json", *sorted(', "scores of other weights are accepted", OF_STORED,
    ),
    Fault(
        "fingerprint-tokenizer", FINGERPRINT, "weights_digest(model), manifest.tokenizer_fingerprint,",
        'weights_digest(model), "",', "scores of another tokenizer are accepted", OF_STORED,
    ),
    Fault(
        "fingerprint-precision", FINGERPRINT, "blocks_digest(manifest), precision)", 'blocks_digest(manifest), "fp32")',
        "scores of another precision are accepted", OF_STORED,
    ),
    Fault(
        "scores-of-other-rows", STORED, "return self._open[shard_stem][rows]",
        "return self._open[shard_stem][rows - 1]",
        "a block gets the losses of the one before", OF_STORED,
    ),
    Fault(
        "scores-rounded", STORED, "losses.astype(np.float32).ravel()",
        "losses.astype(np.float16).astype(np.float32).ravel()", "losses are stored with the digits of float16",
        OF_STORED,
    ),
    Fault(
        "scores-checksum", STORED, "if is_local and hashed and file_sha256(path) != file.sha256:",
        "if is_local and hashed and not file.sha256:", "altered scores are taken for sound", OF_STORED,
    ),
    Fault(
        "scores-not-finite", STORED, "if not np.isfinite(losses).all():", "if np.isnan(losses).all():",
        "an infinite reference loss is stored", OF_STORED,
    ),
    Fault(
        "scores-of-other-shard", STORED, "metadata.get(SHARD_KEY) == shard.sha256.encode() and rows == shard.rows",
        "rows == shard.rows", "scores of another shard are accepted", OF_STORED,
    ),
)  # fmt: skip
