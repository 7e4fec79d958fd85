"""Faults where models, tokenizers, texts and settings come in: what should be refused, named or kept."""

from __future__ import annotations

from mutations.fault import Fault

WEIGHTS, CHECK, SAVE = ("dualtok/model/folder/weights.py", "dualtok/model/check.py", "dualtok/model/folder/save.py")
ADAPTERS, NORMS, LOAD = "dualtok/model/adapters.py", "dualtok/model/norms.py", "dualtok/model/load.py"
TOKENIZER, SENTENCEPIECE = "dualtok/data/tokenizer.py", "dualtok/data/sentencepiece_model.py"
FORMATS, DOCUMENTS, FOLDER = (
    "dualtok/data/sources/formats.py",
    "dualtok/data/sources/documents.py",
    "dualtok/data/folder.py",
)
DEDUPLICATE, LOSSES = "dualtok/data/prepare/deduplicate.py", "dualtok/data/tokenizer_check.py"
SHARED = "dualtok/data/prepare/shared_passages.py"
KEYS, CONFIG, OPERATORS = (
    f"dualtok/distributed/{name}.py" for name in ("deepspeed_keys", "deepspeed_config", "operators")
)
START, EVENTS = "dualtok/train/start_folder.py", "dualtok/monitor/events.py"
LOOP = "dualtok/train/loop.py"
OF_WHOLE, OF_CHECK = ("tests/model/test_whole_models.py",), ("tests/model/test_check.py",)
OF_ADAPTERS, OF_FORMATS = ("tests/model/test_adapters.py",), ("tests/data/sources/test_formats.py",)
OF_FACTS, OF_TOKENIZER = ("tests/data/prepare/test_facts.py",), ("tests/data/test_tokenizer.py",)
OF_DEDUPLICATE, OF_JSON = ("tests/data/prepare/test_deduplicate.py",), ("tests/distributed/test_deepspeed_config.py",)
OF_EXPORT = (
    "tests/commands/test_export.py::test_an_export_is_what_the_base_was",
    "tests/commands/test_export.py::test_a_model_card_tells_where_a_model_comes_from",
    "tests/commands/test_export.py::test_a_fresh_model_ends_its_texts",
)

BORDERS: tuple[Fault, ...] = (
    Fault(
        "missing-tensors-pass",
        WEIGHTS,
        '("missing", missing), ("of another',
        '("of another',
        "a tensor that is missing is drawn at random",
        OF_WHOLE,
    ),
    Fault(
        "shapes-pass",
        WEIGHTS,
        "if name in shapes and shape != shapes[name]",
        "if False",
        "a tensor of another shape is not named",
        OF_WHOLE,
    ),
    Fault(
        "unread-tensors-pass",
        WEIGHTS,
        "if name not in shapes and not may_add(name)]",
        "if False]",
        "tensors of no use pass",
        OF_WHOLE,
    ),
    Fault(
        "experts-not-counted",
        WEIGHTS,
        "if name not in parts\n        ]",
        "if False\n        ]",
        "an expert may be missing",
        OF_WHOLE,
    ),
    Fault(
        "tied-heads-differ",
        WEIGHTS,
        "if not torch.equal(one, other):",
        "if False:",
        "a head of its own passes for a tied one",
        OF_WHOLE,
    ),
    Fault(
        "buffers-refused",
        WEIGHTS,
        '*computed, *(f"^{re.escape(name)}$" for name in buffers)]',
        "]",
        "old folders with rotary frequencies are refused",
        OF_WHOLE,
    ),
    Fault(
        "adapter-added",
        LOAD,
        "_require_no_adapter(Path(path))",
        "Path(path)",
        "an adapter beside the weights is added to them",
        OF_WHOLE,
    ),
    Fault(
        "adapter-by-last-name",
        ADAPTERS,
        "sorted(_stored_layers(folder) - _linear_names(empty_causal_lm(config)))",
        "list[str]()",
        "an adapter of a deeper model passes",
        OF_ADAPTERS,
    ),
    Fault(
        "another-base-passes",
        ADAPTERS,
        "(name := first_difference(theirs, base)) is not None",
        "(name := None) is not None",
        "an adapter of another base passes",
        OF_ADAPTERS,
    ),
    Fault(
        "vocabularies-not-compared",
        CHECK,
        "if known.get(token) != index and",
        "if False and",
        "a model of another vocabulary is audited",
        OF_CHECK,
    ),
    Fault(
        "cuts-not-compared", CHECK, "if ours != own:", "if False:", "a tokenizer that cuts otherwise passes", OF_CHECK
    ),
    Fault(
        "ids-off-by-one",
        FOLDER,
        "at_least > self.largest_id:",
        "at_least >= self.largest_id:",
        "the largest id counts as known",
        OF_CHECK,
    ),
    Fault(
        "holes-not-counted",
        TOKENIZER,
        "return 1 + max(tokenizer.get_vocab().values(), default=-1)",
        "return len(tokenizer)",
        "ids beyond a hole have no row",
        OF_CHECK,
    ),
    Fault(
        "special-tokens-encoded",
        TOKENIZER,
        "split_special_tokens=not special",
        "split_special_tokens=special",
        "a document ends where it spells out the end token",
        OF_FACTS,
    ),
    Fault(
        "spelled-out-by-start",
        LOSSES,
        "return self._pattern.search(text) is not None",
        "return True",
        "each text with the beginning of a token counts",
        OF_FACTS,
    ),
    Fault(
        "losses-unseen",
        LOSSES,
        'if text in (again, again.removeprefix(" ")):',
        "if True:",
        "a lossy tokenizer goes unnoticed",
        OF_FACTS,
    ),
    Fault(
        "passages-of-the-first",
        SHARED,
        "for some in _portions(_pieces(folder / MEMBERS, splits[MEMBERS])):",
        "for some in list(_portions(_pieces(folder / NON_MEMBERS, splits[NON_MEMBERS])))[1:]:",
        "non-members are compared with themselves",
        OF_FACTS,
    ),
    Fault(
        "control-pieces-found",
        SENTENCEPIECE,
        "if trainer.model_type == UNIGRAM else []",
        "if False else []",
        "a control piece that is spelled out becomes the piece",
        OF_TOKENIZER,
    ),
    Fault(
        "ids-not-tried",
        SENTENCEPIECE,
        "if ids != model.encode(text):",
        "if False:",
        "a model with other ids than sentencepiece's passes",
        OF_TOKENIZER,
    ),
    Fault(
        "byte-order-mark-stays",
        FORMATS,
        "line = raw.removeprefix(MARK) if number == 0 else raw",
        "line = raw",
        "a byte-order mark is part of the first line",
        OF_FORMATS,
    ),
    Fault(
        "returns-not-lines",
        FORMATS,
        'only_returns = b"\\r" in head and b"\\n" not in head',
        "only_returns = False",
        "lines that end in carriage returns are one, in memory",
        OF_FORMATS,
        survives="such a line is split all the same, in memory; that it is read in pieces no test sees",
    ),
    Fault(
        "later-text-ignored",
        "dualtok/data/sources/json_fields.py",
        "if key in (field, group_field) and text[position] == '\"':",
        "if False:",
        "the text of an object beyond the limits is lost",
        OF_FORMATS,
    ),
    Fault(
        "links-not-followed",
        DOCUMENTS,
        "followlinks=True",
        "followlinks=False",
        "documents below a link are left out",
        OF_FORMATS,
    ),
    Fault(
        "mixed-types-encoded",
        DOCUMENTS,
        "builder.config.on_mixed_types = None",
        "pass",
        "a text becomes its JSON source",
        OF_FORMATS,
    ),
    Fault(
        "words-without-spaces",
        DEDUPLICATE,
        "of_characters = is_without_spaces(letters)",
        "of_characters = False",
        "near duplicates in Chinese pass",
        OF_DEDUPLICATE,
    ),
    Fault(
        "edge-of-a-script",
        DEDUPLICATE,
        'np.searchsorted(edges, every, side="right")',
        'np.searchsorted(edges, every, side="left")',
        "the first letter of a script is none",
        OF_DEDUPLICATE,
    ),
    Fault("unknown-keys-pass", KEYS, "    if key not in names:", "    if False:", "a misspelt key is ignored", OF_JSON),
    Fault(
        "auto-stage-is-0",
        KEYS,
        'if isinstance(zero, dict) and zero.get("stage") == AUTO:',
        "if False:",
        '"auto" turns ZeRO off',
        OF_JSON,
    ),
    Fault(
        "true-is-a-number", KEYS, "(kind == FLAG or not isinstance(value, bool))", "True", "true passes for 1", OF_JSON
    ),
    Fault(
        "amsgrad-passes", CONFIG, '"amsgrad": (False,', '"amsgrad": (True,', "another optimizer is asked for", OF_JSON
    ),
    Fault(
        "remainder-lost",
        "dualtok/train/checks.py",
        "math.ceil(settings.epochs",
        "math.floor(settings.epochs",
        "the last blocks of an epoch are never seen",
        ("tests/train/test_epochs.py",),
    ),
    Fault(
        "lock-of-the-dead",
        OPERATORS,
        "if not is_held(lock) and not is_shared(lock):",
        "if False:",
        "a lock whose holder died is waited for for ever",
        ("tests/distributed/test_operators.py",),
    ),
    Fault(
        "turn-not-kept",
        OPERATORS,
        "with _turn(folder, name):",
        "if True:",
        "two processes build one operator",
        ("tests/distributed/test_operators.py",),
    ),
    Fault(
        "norm-in-float32",
        NORMS,
        "double = chunk.double()",
        "return tensor.detach().norm().double().square()",
        "the norm of a long gradient is too small",
        ("tests/model/test_norms.py",),
    ),
    Fault(
        "names-of-memory",
        SAVE,
        "revert_weight_conversion(self._model, whole)",
        "whole",
        "an export has names that other readers do not know",
        OF_EXPORT,
    ),
    Fault(
        "end-token-of-another",
        START,
        "setattr(config, name, getattr(tokenizer, name))",
        "pass",
        "a fresh model never ends",
        OF_EXPORT,
    ),
    Fault(
        "settings-of-the-base-lost",
        START,
        "for file in extra_files(base):",
        "for file in ():",
        "an export loses the base's generation settings",
        OF_EXPORT,
    ),
    Fault(
        "roll-back-not-told",
        "dualtok/train/reporter.py",
        "self._events.forget_after(step)",
        "pass",
        "who watches sees the repeated steps twice",
        ("tests/multi_rank/test_guard.py",),
    ),
    Fault(
        "steps-twice",
        EVENTS,
        "add_event(restart, step + 1)",
        "add_event(restart, step + 10**6)",
        "TensorBoard shows repeated steps twice",
        ("tests/train/test_monitors.py",),
    ),
)
