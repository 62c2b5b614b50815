"""Keeps the record of a training run: record.py RUNS TABLES STAGE...

RUNS is the folder of `keye train run`, TABLES what bench/nano/table.sh wrote, STAGE the stages in their order. Writes beside the recipe,
recipes/keye-nano/run/: metrics.jsonl, a line for every ten steps with their means (a stage that RUNS does not have keeps its lines);
loss.svg, the loss of all stages side by side; accuracy.svg. Puts the tables into docs/keye-nano.md, between the marks. Python's standard
library alone.
"""

import json
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
GROUP = 10
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1900, 300, 40, 40, 12
NARROWEST = 600  # steps: a shorter stage has a panel of this width
MEANS = ("loss", "gradient_norm", "tokens", "targets", "patches", "seconds", "gflops")


def groups(path):
    """Means of ten steps each."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for at in range(0, len(lines), GROUP):
        part = lines[at : at + GROUP]
        mean = {name: float(f"{sum(line[name] for line in part) / len(part):.5g}") for name in MEANS}
        held_out = [line["held_out"] for line in part if line.get("held_out") is not None]
        more = {"held_out": round(held_out[-1], 4)} if held_out else {}
        yield {"step": part[-1]["step"], "lr": float(f"{part[-1]['lr']:.5g}"), **mean, **more}


def stage(name, runs, record):
    """The lines of a stage: of its run, else those recorded before."""
    metrics = runs / name / "metrics.jsonl"
    if metrics.exists():
        return list(groups(metrics))
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rows = [{key: value for key, value in row.items() if key != "stage"} for row in rows if row["stage"] == name]
    return rows or sys.exit(f"{metrics}: no such file, and {record} has no stage {name}")


def svg(stages):
    """One panel a stage, as wide as it has steps, or a little wider; every panel from 0 to its own largest loss after the first tenth."""
    steps = [rows[-1]["step"] for _, rows in stages]
    gap = 34
    scale = (WIDTH - LEFT - gap * len(stages)) / sum(max(n, NARROWEST) for n in steps)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="10">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    x0 = LEFT
    for (name, rows), n in zip(stages, steps):
        width = max(n, NARROWEST) * scale
        settled = [row["loss"] for row in rows[len(rows) // 10 :]]
        top = max(settled) * 1.05
        y = lambda loss: TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, top) / top)
        for quarter in range(5):
            value = top * quarter / 4
            out.append(f'<path d="M{x0:.0f} {y(value):.1f}h{width:.0f}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 3:.0f}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.2f}</text>')
        for field, colour in (("loss", "#1f5f99"), ("held_out", "#e08e2b")):
            points = [f"{x0 + width * row['step'] / n:.1f},{y(row[field]):.1f}" for row in rows if field in row]
            if points:
                out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>')
        out.append(f'<text x="{x0 + width / 2:.0f}" y="{HEIGHT - 22}" text-anchor="middle">{name}</text>')
        out.append(f'<text x="{x0 + width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle" fill="#777">{n} steps</text>')
        x0 += width + gap
    return "\n".join([*out, "</svg>", ""])


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    runs, tables = map(pathlib.Path, sys.argv[1:3])
    out = ROOT / "recipes/keye-nano/run"
    out.mkdir(parents=True, exist_ok=True)
    stages = [(name, stage(name, runs, out / "metrics.jsonl")) for name in sys.argv[3:]]
    lines = [json.dumps({"stage": name, **row}) + "\n" for name, rows in stages for row in rows]
    (out / "metrics.jsonl").write_text("".join(lines))
    (out / "loss.svg").write_text(svg(stages))
    if not (tables / "tables.md").exists():
        sys.exit(f"{tables}: no tables.md yet, so that only the curves were written")
    shutil.copy(tables / "accuracy.svg", out)
    picture = "![Scores of each kind of question, with the clip and without](../recipes/keye-nano/run/accuracy.svg)"
    page = ROOT / "docs/keye-nano.md"
    text, found = re.subn(
        "(<!-- tables -->\n).*?(<!-- end of tables -->)",
        lambda marks: f"{marks[1]}\n{(tables / 'tables.md').read_text()}\n{picture}\n\n{marks[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        sys.exit(f"{page}: expected the marks of the tables once, found them {found} times")
    page.write_text(text)


if __name__ == "__main__":
    main()
