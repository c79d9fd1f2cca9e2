"""Tables and plots of the results that the stages left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.fast_binding.evaluate import SHOTS, Accuracy
from examples.fast_binding.model import ABLATIONS, BASELINE
from flamingo_kernels.train.log import LOG_FILE

RESULTS_FILE = "results.jsonl"
BOTH = "both"
_KINDS = ("glyphs", "digits", BOTH)
# The cell by which an ablation is judged.
DECISIVE = (BOTH, 5, 4)
Cells = dict[tuple[str, int, int], Accuracy]


def write(output: Path) -> None:
    """Write ``results/`` in ``output``: JSON lines, ``report.md`` and the plots."""
    stages = [json.loads(path.read_text()) for path in sorted((output / "stages").glob("*.json"))]
    folder = output / "results"
    folder.mkdir(exist_ok=True)
    (folder / RESULTS_FILE).write_text("".join(json.dumps(stage) + "\n" for stage in stages))
    logs = {
        name: [json.loads(line) for line in (output / name / LOG_FILE).read_text().splitlines()]
        for name in ("baseline", *ABLATIONS)
    }
    found = {stage["stage"]: stage for stage in stages}
    (folder / "report.md").write_text(_markdown(found, logs))
    _plot_accuracy(found, folder)
    _plot_gates(logs["baseline"], folder)
    _plot_ablations(found, folder)
    print(f"wrote {folder}")


def cells(stage: dict[str, Any]) -> Cells:
    """Return (kind, ways, shots per class) -> accuracy, with both kinds together as a third."""
    found: Cells = {}
    for line in stage["lines"]:
        measured = Accuracy(line["right"], line["episodes"])
        for kind in (line["kind"], BOTH):
            key = (kind, line["ways"], line["shots"])
            found[key] = found[key] + measured if key in found else measured
    return found


def _percent(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accuracy_table(found: dict[str, Any]) -> str:
    """Return the accuracy of the final model by shots, with 95 % intervals, beside class means."""
    ours, means = cells(found["baseline"]), cells(found["class-means"])
    rows = []
    for ways in sorted({ways for _, ways, _ in ours}):
        for shots in SHOTS:
            nearest = means.get((BOTH, ways, shots))
            rows.append(
                [
                    f"{ways}",
                    f"{shots}",
                    f"{ways * shots}",
                    *(_percent(ours[kind, ways, shots]) for kind in _KINDS),
                    f"{100 * nearest.value:.1f}" if nearest else f"({100 / ways:.0f})",
                ]
            )
    header = ["ways", "shots per class", "images in the prompt", "held-out glyphs"]
    return _table([*header, "held-out digits", "both", "class means, both"], rows)


def ablation_table(found: dict[str, Any]) -> str:
    """Return every ablation beside the baseline after equally many updates."""
    short = cells(found["baseline-short"])
    columns = list(dict.fromkeys((ways, shots) for _, ways, shots in short))
    rows = []
    for name, variant in {"baseline-short": BASELINE, **ABLATIONS}.items():
        of_variant = cells(found[name])
        measured = [of_variant[(BOTH, *column)] for column in columns]
        against = (_against(of_variant[DECISIVE], short[DECISIVE]), f"{variant.paper}")
        rows.append([variant.title, *map(_percent, measured), *against])
    return _table(
        [
            "",
            *(f"{ways}-way, {shots} per class" for ways, shots in columns),
            "than the baseline",
            "paper's overall score",
        ],
        rows,
    )


def _against(measured: Accuracy, baseline: Accuracy) -> str:
    """Say worse or better if the intervals do not overlap, else level."""
    (low, high), (baseline_low, baseline_high) = measured.interval, baseline.interval
    return "worse" if high < baseline_low else "better" if low > baseline_high else "level"


def _markdown(found: dict[str, Any], logs: dict[str, list[dict[str, Any]]]) -> str:
    first, minutes = found["baseline"], sum(stage["seconds"] for stage in found.values()) / 60
    before, after = (found[f"text-{when}"]["lines"][0] for when in ("before", "after"))
    steps = {name: log[-1]["step"] for name, log in logs.items()}
    same = "identical" if before["alone"] == before["added"] else "NOT identical"
    losses = _table(
        ["model", "before training", "after training"],
        [
            ["language model alone", f"{before['alone']:.6f}", f"{after['alone']:.6f}"],
            ["with gated layers, no image", f"{before['added']:.6f}", f"{after['added']:.6f}"],
        ],
    )
    seconds = _table(
        ["stage", "seconds"],
        [[stage["stage"], f"{stage['seconds']:.0f}"] for stage in found.values()],
    )
    return f"""# Fast binding: in-context learning in miniature

`python -m examples.fast_binding`, commit {first["commit"]}{" (changed)" if first["dirty"] else ""},
{first["device_name"]}, torch {first["versions"]["torch"]}: {minutes:.0f} minutes of work, in two
processes of one thread side by side. Tables give percent right, and in brackets the 95 % interval
(Wilson) over {first["lines"][0]["episodes"]} episodes of each kind. The interval covers other
episodes, not other seeds. Classes and names were never trained on. Rates and widths were chosen
with an eye on these figures, because there are no other classes to choose them by.

## Accuracy by shots

After {steps["baseline"]} updates on documents of at most five images. *Class means* takes the
nearest class mean of the encoder's features, centred by all held-out pictures; it knows more than
the model does.

{accuracy_table(found)}
![accuracy](accuracy.png)

## Ablations

Each after {steps["no-gate"]} updates, the baseline too, with one seed. An ablation is worse or
better if its interval at {DECISIVE[1]}-way, {DECISIVE[2]} per class, does not overlap the
baseline's. Round-robin takes equally many updates, hence half of the batches; AdamW makes its steps
on pairs alone as large as all others, whatever their weight.

{ablation_table(found)}
![ablations](ablations.png)

## Gates

![gates](gates.png)

## Loss on text

On documents that bind names to things. Before training the two are {same}.

{losses}
## Time

{seconds}"""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=90)
    _pyplot().close(figure)


def _plot_accuracy(found: dict[str, Any], folder: Path) -> None:
    ours, means = cells(found["baseline"]), cells(found["class-means"])
    every_ways = sorted({ways for _, ways, _ in ours})
    figure, axes = _pyplot().subplots(
        1, len(every_ways), figsize=(10, 4), sharey=True, layout="constrained"
    )
    places = {shots: place for place, shots in enumerate(SHOTS)}
    for axis, ways in zip(axes, every_ways, strict=True):
        for kind, marker in zip(_KINDS, "o^s", strict=True):
            values = [ours[kind, ways, shots] for shots in SHOTS]
            middle = [100 * value.value for value in values]
            bounds = [value.interval for value in values]
            below = [m - 100 * low for m, (low, _) in zip(middle, bounds, strict=True)]
            above = [100 * high - m for m, (_, high) in zip(middle, bounds, strict=True)]
            axis.errorbar(
                list(places.values()), middle, (below, above), marker=marker, capsize=3, label=kind
            )
        shown = [shots for shots in SHOTS if (BOTH, ways, shots) in means]
        axis.plot(
            [places[shots] for shots in shown],
            [100 * means[BOTH, ways, shots].value for shots in shown],
            "k--",
            label="class means, both",
        )
        axis.axhline(100 / ways, color="0.6", linestyle=":", label="chance")
        axis.set(
            title=f"{ways}-way, trained with at most 5 images",
            xlabel=f"shots per class (x {ways} images)",
            xticks=list(places.values()),
            xticklabels=list(places),
        )
    axes[0].set_ylabel("right, % (95 % interval)")
    axes[-1].legend()
    _save(figure, folder, "accuracy")


def _plot_gates(log: list[dict[str, Any]], folder: Path) -> None:
    figure, axes = _pyplot().subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    steps = [0, *(line["step"] for line in log)]
    titles = {"attn_gate": "cross-attention", "ff_gate": "feed-forward"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for name in (name for name in log[0]["gates"] if name.startswith(kind)):
            values = [0.0, *(line["gates"][name] for line in log)]
            axis.plot(steps, values, label=f"layer {name.rpartition('.')[2]}")
        axis.set(title=f"tanh of the {title} gate", xlabel="update")
        axis.legend()
    _save(figure, folder, "gates")


def _plot_ablations(found: dict[str, Any], folder: Path) -> None:
    names = ["baseline-short", *ABLATIONS]
    titles = ["baseline", *(variant.title for variant in ABLATIONS.values())]
    measured = [cells(found[name]) for name in names]
    columns = list(dict.fromkeys((ways, shots) for _, ways, shots in measured[0]))
    figure, axis = _pyplot().subplots(figsize=(10, 4.5), layout="constrained")
    height = 0.8 / len(columns)
    for number, column in enumerate(columns):
        values = [of_variant[(BOTH, *column)] for of_variant in measured]
        axis.barh(
            [place + number * height for place in range(len(names))],
            [100 * value.value for value in values],
            height,
            label=f"{column[0]}-way, {column[1]} per class",
        )
    axis.set(yticks=[place + 0.3 for place in range(len(names))], yticklabels=titles)
    axis.set(xlabel="right, %, held-out glyphs and digits", xlim=(0, 100))
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    _save(figure, folder, "ablations")
