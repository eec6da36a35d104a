"""Results for people: a table for the terminal and a paper, and a page that shows images of the classes."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mutor_vision.data import images
from mutor_vision.features.extractors import resize
from mutor_vision.features.sources import in_order
from mutor_vision.names import in_words, printable
from mutor_vision.storage.files import written

STRIP_COLUMNS = 8  # pictures of a class in the page
PAIRS_IN_ROW = 4  # of a sample and its nearest reference image, in a picture of them
PAIRS_NAMED = 5  # in the terminal
STRIP_PIXELS = 104  # about the sides of a picture in the page: larger ones shrink, smaller ones grow by a factor

# A column without entries is left out of the terminal's table. "real images": the same measured on real images.
HEAD = ("metric", "value", "± s.e.", "bias-corrected", "95 % interval", "real images")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; }
th { border-bottom: 1px solid #999; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.warnings { background: #fff4d6; padding: .6rem 2rem; border-left: 4px solid #d9a400; } .note { color: #666; }
.class { margin: 1.4rem 0; } .class img { display: block; margin: .25rem 0; max-width: 100%; }
.scroll { max-height: 30rem; overflow-y: auto; }
"""


def table(result: dict) -> str:
    """A Markdown table of every metric, then the warnings and one line of protocol."""
    rows = [HEAD, *(_cells(entry) for entry in result["metrics"].values())]
    return "\n".join([markdown(rows), "", *notes(result)])


def _cells(entry: dict) -> tuple[str, ...]:
    """One metric in the columns of HEAD."""
    low_high = entry.get("interval_95")
    return (
        entry["name"],
        number(entry["value"]),
        number(entry.get("standard_error", entry.get("standard_deviation"))),
        number(entry.get("bias_corrected")),
        f"{number(low_high[0])} to {number(low_high[1])}" if low_high else "",
        number(entry["real"]["value"]) if "real" in entry else "",
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """An aligned table, the first row its head, without the columns that have no entry."""
    columns = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    lines = ["| " + " | ".join(row[column].ljust(widths[column]) for column in columns) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (widths[column] + 2) for column in columns) + "|")
    return "\n".join(lines)


def notes(result: dict) -> list[str]:
    """The warnings, and what was compared, one line each: names of files and classes in it cannot begin another."""
    protocol = result["protocol"]
    extractor = protocol["extractor"]
    accuracy = extractor.get("held_out_accuracy")
    lines = [f"warning: {text}" for text in result["warnings"]]
    lines.append(
        f"{protocol['samples']['path']} against {protocol['reference']['path']}, {extractor['name']} "
        f"({extractor['weights']} weights"
        + (f", held-out accuracy {accuracy:.1%}" if accuracy is not None else "")
        + f"), {protocol['protocol']} protocol, resize {extractor['resize']}"
    )
    of = dict.fromkeys(entry["real"]["of"] for entry in result["metrics"].values() if "real" in entry)
    if of:
        lines.append(f"real images: what {' or '.join(of)} images measure in the samples' place")
    if protocol["reference"]["distance_from"] != "images":
        lines.append(f"distances from the {protocol['reference']['distance_from']}: {protocol['reference']['path']}")
    if closest := result.get("copies", {}).get("closest", [])[:PAIRS_NAMED]:
        named = (f"{pair['sample']} and {pair['reference']} ({number(pair['distance'])})" for pair in closest)
        lines.append(f"closest samples and reference images, by index from 0 (distance): {', '.join(named)}")
    if any("standard_deviation" in entry for entry in result["metrics"].values()):
        lines.append("± of IS and KID is the deviation over splits or subsets, not an error of the mean")
    return list(map(printable, lines))


def number(value: float | None) -> str:
    """4 significant digits, never fewer than the integer part; '' for None."""
    if value is None:
        return ""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def page(result: dict, samples, reference, shown: int = 5) -> str:
    """One self-contained HTML page: the table, then the `shown` worst and best classes as strips of samples above
    strips of reference images, then every class. Without scripts; names and paths are escaped."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style></head><body><h1>Evaluation</h1>",
        _metrics_html(result),
    ]
    classes = result.get("classes")
    if classes is None:
        parts.append("<p>No labels came with the samples, so there is nothing to say of single classes.</p>")
    else:
        order, by = _ranking(classes)
        worst, best = order[:shown], order[shown:][::-1][:shown]
        strips = _strip_maker(classes, worst + best, samples, reference)
        for title, chosen in (("Worst classes", worst), ("Best classes", best)):
            if chosen:
                parts.append(f"<h2>{title}</h2><p class=note>By {by}. Above: samples; below: the reference.</p>")
                parts += [strips(number) for number in chosen]
        parts.append(_class_table(classes, order or range(len(classes["names"]))))
    return "\n".join(parts) + "</body></html>\n"


def write_page(path: Path, text: str) -> None:
    """Write a page atomically (files.written)."""
    with written(path) as partial:
        # Folder names may hold bytes that are not valid text; those become character references.
        partial.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def _metrics_html(result: dict) -> str:
    rows = [_cells(entry) for entry in result["metrics"].values()]
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in result["warnings"])
    lines = [html.escape(line) for line in notes(result) if not line.startswith("warning: ")]
    return (
        _html_table(HEAD, rows)
        + (f'<ul class="warnings">{warnings}</ul>' if warnings else "")
        + f'<p class="note">{"<br>".join(lines)}</p>'
    )


def _ranking(classes: dict) -> tuple[list[int], str]:
    """Classes from worst to best by accuracy where there is one, ties and all else by distance."""
    distance, accuracy = classes["distance"], classes["class_accuracy"]
    known = [
        index
        for index in range(len(classes["names"]))
        if (distance is not None and distance[index] is not None)
        or (accuracy is not None and accuracy[index] is not None)
    ]

    def badness(index: int) -> tuple[float, float]:
        right = accuracy[index] if accuracy is not None and accuracy[index] is not None else 1.0
        far = distance[index] if distance is not None and distance[index] is not None else 0.0
        return right, -far

    by = "accuracy under the extractor's classifier, then distance" if accuracy is not None else "distance"
    return sorted(known, key=badness), by


def _strip_maker(classes: dict, shown: list[int], samples, reference) -> Callable[[int], str]:
    from mutor_vision.metrics.per_class import matched_labels

    reference_labels = matched_labels(reference, list(samples.class_names))
    of_samples = _strips(samples, samples.labels, shown)
    of_reference = _strips(reference, reference_labels, shown) if reference_labels is not None else None

    def strips(index: int) -> str:
        found = [of_samples[index]]
        if of_reference is not None:
            found.append(of_reference[index])
        facts = [html.escape(in_words(classes["names"][index]))]
        if classes["distance"] is not None and classes["distance"][index] is not None:
            facts.append(f"distance {number(classes['distance'][index])}")
        if classes["class_accuracy"] is not None and classes["class_accuracy"][index] is not None:
            facts.append(f"accuracy {classes['class_accuracy'][index]:.0%}")
        return f'<div class="class"><b>{facts[0]}</b> {" · ".join(facts[1:])}{"".join(found)}</div>'

    return strips


def _strips(source, labels: Tensor, shown: list[int]) -> dict[int, str]:
    """Class -> its first images as one PNG inside the page. All are read in one pass, because the sampler is faster in
    large batches and a compressed npz can only be read forward."""
    chosen = {index: (labels == index).nonzero().flatten()[:STRIP_COLUMNS].tolist() for index in shown}
    pictures = _pictures(source, {number for numbers in chosen.values() for number in numbers})
    return {index: _strip([pictures[number] for number in numbers]) for index, numbers in chosen.items()}


def _pictures(source, numbers: set[int]) -> dict[int, Tensor]:
    """Number -> image, uint8 (1, 3, H, W), in one pass."""
    wanted = sorted(numbers)
    return dict(zip(wanted, in_order(source, [(number, number + 1) for number in wanted]), strict=True))


def copies_picture(result: dict, samples, reference) -> Image.Image:
    """The closest pairs of the copy check: each sample with its nearest reference image at its right, the closest pair
    first, row by row."""
    pairs = [(pair["sample"], pair["reference"]) for pair in result["copies"]["closest"]]
    ours = _pictures(samples, {sample for sample, _ in pairs})
    theirs = _pictures(reference, {image for _, image in pairs})
    cells = [picture for sample, image in pairs for picture in (ours[sample], theirs[image])]
    return images.grid(torch.cat(cells), columns=2 * PAIRS_IN_ROW)


def _strip(pictures: list[Tensor]) -> str:
    if not pictures:
        return '<p class="note">no image</p>'
    row = torch.cat(pictures)
    if row.shape[-1] > STRIP_PIXELS:
        row = resize(row, STRIP_PIXELS)
    file = io.BytesIO()
    images.grid(row, columns=STRIP_COLUMNS, min_cell=STRIP_PIXELS).save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _class_table(classes: dict, order) -> str:
    head = ["class", "samples"]
    columns = [list(map(in_words, classes["names"])), classes["samples"]]
    if classes["distance"] is not None:
        head.append("distance")
        columns.append([number(value) for value in classes["distance"]])
    if classes["class_accuracy"] is not None:
        head.append("accuracy")
        columns.append(["" if value is None else f"{value:.1%}" for value in classes["class_accuracy"]])
    rows = [[column[index] for column in columns] for index in order]
    return f'<h2>All classes</h2><div class="scroll">{_html_table(head, rows)}</div>'


def _html_table(head, rows) -> str:
    def cells(tag: str, row) -> str:
        made = (f"<{tag}{' class=number' if i else ''}>{html.escape(str(cell))}</{tag}>" for i, cell in enumerate(row))
        return "<tr>" + "".join(made) + "</tr>"

    return "<table>" + cells("th", head) + "".join(cells("td", row) for row in rows) + "</table>"
