"""What a run logged, read back, however its process ended."""

from __future__ import annotations

from pathlib import Path

from loratune.runs.history import append, curves, cut, notes, read


def test_lines_are_kept_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run" / "history.jsonl"
    assert read(path) == []
    append(path, {"step": 1, "loss": 0.5})
    append(path, {"step": 2, "loss": 0.25, "warning": "so"})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert read(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "warning": "so"}]
    assert notes(read(path)) == [(2, "so")]


def test_a_step_counts_once_and_the_last_time() -> None:
    told = [{"step": 4, "loss": 1.0}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"step": 1, "x": "word"}]
    assert curves(told) == {"loss": [(2, 3.0), (4, 2.0)]}
    assert curves([{"step": 1, "loss": float("nan")}]) == {}


def test_what_came_after_a_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    cut(path, 3)
    for step in (1, 5, 3):
        append(path, {"step": step, "loss": float(step)})
    cut(path, 3)
    assert [record["step"] for record in read(path)] == [1, 3]
    assert [one.name for one in tmp_path.iterdir()] == ["history.jsonl"]
