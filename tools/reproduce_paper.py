"""The paper's tables, measured again: every method on the same data, under the same attacks, with the paper's figures.

    python tools/reproduce_paper.py --scale smoke --folder runs/paper-smoke      # minutes: a test of the tool
    python tools/reproduce_paper.py --scale cpu --folder runs/paper              # headline rows, 3 seeds x 2 corpora
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts plus frontier known  # dual_plus
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts baselines  # other defences
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts further --cells sotu-0 wikipedia-0
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts sweeps private ablations longer lora lira
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts lira-scales releases
    python tools/reproduce_paper.py --scale cpu --folder runs/paper --parts dynamics backdoor auxiliary pretraining
    python tools/reproduce_paper.py --scale cpu --folder runs/map --parts map  # where the method pays: hours
    python tools/reproduce_paper.py --scale pretrained --folder runs/smollm2 --cells sotu-0  # SmolLM2-135M, adapters
    python tools/reproduce_paper.py --scale gpu --model pythia-1.4b --folder runs/pythia  # the paper's models and data

A cell is one corpus under one seed: its split, its models, its audits. Every step is a command with its own run file in
the cell's folder, and is done once: when started again, the tool continues where it stopped. A part is run with the
steps that it needs, and nothing else. The tables are written after each finished audit, to ``results.md`` and
``results.json``. The parts ``headline``, ``plus``, ``frontier``, ``known``, ``further`` and ``baselines`` are for every
cell, the others for the first corpus and seed. ``tools/paper/parts.py`` says what is in each part,
``tools/paper/scales.py`` how large it is.

The scale ``gpu`` needs a data hub, a model hub and a GPU; neither it nor ``pretrained`` has been run.
"""

from __future__ import annotations

import argparse
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

from paper.cell import Cell, base_model
from paper.grid import cell_of, measure
from paper.parts import CELL_PARTS, OWN_DATA, Part
from paper.scales import BY_MODEL, SCALES, Scale, resized, with_model, without_adapters
from paper.steps import Step, carry_out
from paper.tables import write_results

from dualtok.data.sources.corpora import sotu_passages, wikipedia_leads, write_jsonl
from dualtok.model.folder.packaged import write_smollm2

EVERY_CELL = ("headline", "plus", "frontier", "known", "further", "baselines")
PARTS = (*CELL_PARTS, *OWN_DATA, "map")


def plan(scale: Scale, root: Path, parts: list[str], chosen: list[str] | None) -> tuple[list[Cell], list[Step]]:
    """Return all cells, and the steps of the chosen parts and cells with all that they need."""
    cells: list[Cell] = []
    known: dict[str, Step] = {}
    wanted: list[str] = []

    def add(cell: Cell, part: Part, *, asked: bool) -> None:
        start = len(cell.steps)
        part(cell)
        new = cell.steps[start:]
        known.update({step.name: step for step in new})
        ends = [step for step in new if step.arguments[0] == "audit"] or new  # the part dynamics has no audit
        wanted.extend(step.name for step in ends if asked)

    for seed in scale.seeds:
        for corpus in scale.corpora:
            cell = Cell(scale, corpus, seed, root)
            cells.append(cell)
            if chosen is not None and cell.name not in chosen:
                continue
            known.update({step.name: step for step in base_model(cell)})
            first = len(cells) == 1
            for name, part in CELL_PARTS.items():
                asked = name in parts and (first or name in EVERY_CELL)
                if asked or name == "headline":  # the others build on its models
                    add(cell, part, asked=asked)
    corpus, seed = scale.corpora[0], scale.seeds[0]

    def variant(name: str, shares: dict[str, float]) -> Cell:
        return Cell(scale, corpus, seed, root, variant=name, shares=shares)

    kinds = {
        "auxiliary": [
            variant(f"auxiliary x{factor:g}", resized(scale.shares[corpus], factor)) for factor in scale.auxiliary
        ],
        "pretraining": [variant("pretraining", scale.from_scratch)],
    }
    for name, variants in kinds.items():
        cells += variants
        if name in parts:
            for cell in variants:
                known.update({step.name: step for step in base_model(cell)})
                add(cell, OWN_DATA[name], asked=True)
    for point in scale.points:
        cell = cell_of(scale, point, root)
        cells.append(cell)
        if "map" in parts and (chosen is None or cell.name in chosen):
            known.update({step.name: step for step in base_model(cell, point.seed)})
            add(cell, partial(measure, point=point), asked=True)
    return cells, with_needs(wanted, known)


def with_needs(wanted: list[str], known: dict[str, Step]) -> list[Step]:
    """Return the wanted steps and all that they need, in the order in which they are known."""
    needed, names = set[str](), list(wanted)
    while names:
        name = names.pop()
        if name not in needed:
            needed.add(name)
            names += known[name].needs
    return [step for name, step in known.items() if name in needed]


def main() -> None:
    """Carry out the asked parts of a scale and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["headline"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at once")
    parser.add_argument("--cells", nargs="+", default=None, help="e.g. sotu-0 wikipedia-2; without it all")
    parser.add_argument("--model", choices=BY_MODEL, default=None, help="of the scale gpu; without it gpt2")
    parser.add_argument("--full", action="store_true", help="at the scale pretrained: train all weights, not adapters")
    options = parser.parse_args()
    if options.model is not None and options.scale != "gpu":
        parser.error("--model: has no effect without --scale gpu")
    if options.full and options.scale != "pretrained":
        parser.error("--full: has no effect without --scale pretrained")
    scale, root = SCALES[options.scale], options.folder.resolve()
    names = [f"{corpus}-{seed}" for seed in scale.seeds for corpus in scale.corpora]
    names += [cell_of(scale, point, root).name for point in scale.points]
    unknown = [name for name in options.cells or () if name not in names]
    if unknown:
        parser.error(f"--cells: no cell {unknown[0]!r}; there are {', '.join(names)}")
    idle = [name for name in options.parts if name in CELL_PARTS and name not in EVERY_CELL]
    if idle and options.cells and names[0] not in options.cells:
        parser.error(f"--parts: {idle[0]} is for the cell {names[0]} alone, which --cells leaves out")
    if options.model is not None:
        scale = with_model(scale, options.model)
    if options.full:
        scale = without_adapters(scale)
    if scale.packaged:
        scale = replace(scale, model={"path": str(write_smollm2(root / scale.model["path"]))})
    for name, texts in {"sotu": sotu_passages, "wikipedia": wikipedia_leads}.items():
        file = root / "corpora" / f"{name}.jsonl"
        if not scale.sources and not file.is_file():
            write_jsonl(texts(), file)
    cells, steps = plan(scale, root, options.parts, options.cells)
    lock = threading.Lock()

    def after(step: Step) -> None:
        if step.arguments[0] == "audit":
            with lock:
                write_results(cells, root)

    carry_out(steps, options.jobs, after)
    write_results(cells, root)
    print((root / "results.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
