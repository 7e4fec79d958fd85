"""What the paper measured (arXiv 2502.19726), to stand beside what is measured here."""

from __future__ import annotations

GPT_2, PYTHIA, LLAMA = "GPT-2 124M", "Pythia 1.4B", "Llama-2 7B, LoRA"
PRIVATE = "DP-SGD (8, 1e-05)"
FIGURES = ("perplexity", "loss", "ref", "min_k", "zlib")
"""Held-out perplexity, and the AUC of Loss, Ref, Min-K% and Zlib."""
TABLE_1: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    GPT_2: {
        "base": {"Wikipedia": (34.429, 0.473, 0.513, 0.446, 0.497), "CC-news": (29.442, 0.505, 0.498, 0.520, 0.500)},
        "plain": {"Wikipedia": (12.729, 0.577, 0.967, 0.489, 0.544), "CC-news": (21.861, 0.607, 0.855, 0.549, 0.569)},
        "goldfish 25 %": {
            "Wikipedia": (12.853, 0.565, 0.954, 0.486, 0.537),
            "CC-news": (21.902, 0.608, 0.855, 0.547, 0.570),
        },
        PRIVATE: {"Wikipedia": (18.523, 0.463, 0.536, 0.448, 0.491), "CC-news": (26.022, 0.507, 0.513, 0.521, 0.502)},
        "dual": {"Wikipedia": (13.628, 0.454, 0.463, 0.470, 0.485), "CC-news": (23.733, 0.502, 0.495, 0.529, 0.499)},
    },
    PYTHIA: {
        "plain": {"Wikipedia": (6.439, 0.578, 0.985, 0.484, 0.557), "CC-news": (11.922, 0.602, 0.857, 0.541, 0.574)},
        "dual": {"Wikipedia": (6.553, 0.468, 0.485, 0.472, 0.485), "CC-news": (12.670, 0.501, 0.460, 0.524, 0.499)},
    },
    LLAMA: {
        "plain": {"Wikipedia": (3.830, 0.524, 0.936, 0.494, 0.530), "CC-news": (6.261, 0.559, 0.798, 0.536, 0.548)},
        "dual": {"Wikipedia": (4.006, 0.458, 0.440, 0.473, 0.480), "CC-news": (6.395, 0.507, 0.482, 0.518, 0.500)},
    },
}
"""Model -> method -> the paper's corpus -> :data:`FIGURES`."""
CORPUS = {"wikipedia": "Wikipedia", "sotu": "CC-news", "cc_news": "CC-news"}
"""Our corpus -> that of the paper which it stands beside: encyclopedia, and what was said or written for the day."""
ELSEWHERE = {"LoRA, plain": (LLAMA, "plain"), "LoRA, dual": (LLAMA, "dual")}
"""Row -> the model and method whose figures stand beside it, where these are not those of the scale's model."""
SAYS = {
    "sweeps": "alpha = 0 (selective) protects little, 1.5 to 2 diverges; K_h .2 to .8 and K_m .1 to .4 change little. "
    "Its figures of other epsilon and Goldfish rates are not known here.",
    "ablations": "selection without a reference (s = CE) ruins perplexity; the pretrained base as reference protects "
    "but costs perplexity.",
    "auxiliary": "1,000 auxiliary samples are nearly as good as 3,000.",
    "pretraining": "1.5B parameters, 1B tokens: plain loss 3.003, AUC .930, 10.10 h; dual 3.244, .548, 12.28 h.",
    "backdoor": "figures not known here.",
}
"""Part -> what the paper reports of it in words."""


def published(row: str, model: str, corpus: str) -> dict[str, float]:
    """Return the paper's :data:`FIGURES` of a method, empty where it gives none.

    Args:
        row: the method's name in our tables.
        model: key of :data:`TABLE_1`.
        corpus: key of :data:`CORPUS`.
    """
    model, row = ELSEWHERE.get(row, (model, row))
    values = TABLE_1[model].get(row, {}).get(CORPUS[corpus])
    return dict(zip(FIGURES, values, strict=True)) if values else {}
