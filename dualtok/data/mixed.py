"""The prepared folders that a run mixes, compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualtok.data.folder import DataFolder
from dualtok.data.remote.remote import location_of
from dualtok.errors import DataError

if TYPE_CHECKING:
    from dualtok.config.data import DataConfig
    from dualtok.data.manifest import Manifest


@dataclass(frozen=True)
class Source:
    """One prepared folder of a mixture."""

    dir: str
    """As the run names it."""
    folder: DataFolder
    weight: float
    """Its share of the samples."""

    @property
    def manifest(self) -> Manifest:
        """Of the folder."""
        return self.folder.manifest


def load_sources(data: DataConfig, split: str) -> list[Source]:
    """Return ``data.dir`` and the folders of ``data.mix``, compared with each other.

    Args:
        data: the run's section.
        split: the split of each that is mixed.

    Raises:
        DataError: a folder is not prepared, lacks the split, or has another tokenizer, block length or number of lanes
            than ``data.dir``; or its split has fewer blocks than lanes.
    """

    def load(folder: str, weight: float) -> Source:
        return Source(folder, DataFolder(location_of(folder, data.stream)), weight)

    main = load(data.dir, 1.0 - sum(other.weight for other in data.mix))
    sources = [main, *(load(other.dir, other.weight) for other in data.mix)]
    for source in sources[1:]:
        for name in ("tokenizer_fingerprint", "block_length", "lanes"):
            theirs, ours = getattr(source.manifest, name), getattr(main.manifest, name)
            if theirs != ours:
                what = name.replace("_", " ")
                raise DataError(
                    f"data.mix: {source.dir} was prepared with {what} {theirs}, but {main.dir} with {ours}; prepare "
                    f"the former again with data.tokenizer={main.dir}/tokenizer, data.block_length="
                    f"{main.manifest.block_length} and data.lanes={main.manifest.lanes}"
                )
    for source in sources if data.mix else ():
        blocks, lanes = source.folder.entry(split).blocks, source.manifest.lanes
        if blocks < lanes:
            raise DataError(
                f"{source.dir}: split {split!r} has {blocks} blocks in {lanes} lanes, but each lane of a mixture "
                "(data.mix) needs a block of each source; prepare it with fewer data.lanes, or leave it out"
            )
    return sources
