"""What rounds of alignment came to, from the lines of their `rounds.jsonl`: a table and a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from rpo.reports.charts import Chart, Series, draw_figure


def format_rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Yield and scores of every round, for the terminal."""
    domains = list(rounds[0]["scores"])
    header = f"{'round':<7}{'images':>8}{'edits':>8}{'pairs':>8}{'trained on':>12}   "
    lines = [header + "".join(f"{domain:<32}" for domain in domains)]
    for one in rounds:
        counts = one.get("yield", {})
        row = f"{one['round'] or 'base':<7}{counts.get('sources', ''):>8}{counts.get('edits', ''):>8}"
        row += f"{counts.get('pairs', ''):>8}{one.get('trained_on', ''):>12}   "
        lines.append((row + "".join(f"{_score(one, domain):<32}" for domain in domains)).rstrip())
    return "\n".join(lines)


def draw_rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Scores and yield over the rounds, as the text of an SVG file."""
    numbers = tuple(float(one["round"]) for one in rounds)
    curves = [
        Series(domain, numbers, tuple(one["scores"][domain] for one in rounds), is_noisy=False)
        for domain in rounds[0]["scores"]
    ]
    charts = [Chart("Mean score on held-out prompts", tuple(curves[:4]), x_label="round")]
    own = [(float(one["round"]), one["yield"]) for one in rounds if "yield" in one]
    share = Series(
        "pairs per image", tuple(n for n, _ in own), tuple(y["pairs"] / y["sources"] for _, y in own), is_noisy=False
    )
    return draw_figure([*charts, Chart("Yield of the curation", (share,), x_label="round")] if own else charts)


def _score(one: Mapping[str, Any], domain: str) -> str:
    text = f"{one['scores'][domain]:.3f}"
    if gain := one.get("gain", {}).get(domain):
        text += f" ({gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])"
    return text
